"""Rewind: the disks of a VM go back to a restore point in place, and only what differs is written."""
