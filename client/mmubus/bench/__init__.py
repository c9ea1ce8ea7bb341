"""The benchmark: rounds and fan-out of mmubus beside other systems and beside the bare transport."""
