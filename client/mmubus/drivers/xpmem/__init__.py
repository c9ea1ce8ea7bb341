"""XPMEM: memory of one process exported to other processes and hosts, which lose it together."""

from mmubus.drivers.xpmem.exporter import Exporter
from mmubus.drivers.xpmem.importer import Attachment, Importer

__all__ = ["Attachment", "Exporter", "Importer"]
