"""Restore points and their block maps."""
