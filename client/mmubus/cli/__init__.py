"""The command line."""

from mmubus.cli.app import main

__all__ = ["main"]
