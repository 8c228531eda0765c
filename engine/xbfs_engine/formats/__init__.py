"""Disk-image layouts as segments. Pure: no I/O, no clock, no randomness."""
