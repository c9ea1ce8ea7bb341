"""Recordings of a real kernel: read, replayed on the bus, compared; and how they are made."""
