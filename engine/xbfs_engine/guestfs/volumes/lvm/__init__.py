"""LVM2: physical volumes, volume groups over several of them, and the logical volumes that can be read."""
