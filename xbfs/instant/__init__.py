"""Instant recovery: sessions that run a VM from a restore point, what serves them, and how they end."""
