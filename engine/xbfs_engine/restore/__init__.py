"""From a restore point to plain images."""
