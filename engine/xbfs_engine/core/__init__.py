"""Errors, ids, limits, clock, randomness and logging: what every layer may use. Pure, but for the system clock."""
