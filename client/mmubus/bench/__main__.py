"""Runs one worker of the benchmark; started by the benchmark itself. People say `mmubus bench`."""

from mmubus.bench.worker import main

main()
