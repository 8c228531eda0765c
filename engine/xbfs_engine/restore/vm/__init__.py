"""From a restore point to a VM, or to disks of their own, on a pool."""
