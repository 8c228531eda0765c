"""Storage of the simulated pool: chains of layers, changed block tracking, kinds of SR, NBD server, VHD streams."""

from __future__ import annotations

from .manager import StorageManager

__all__ = ["StorageManager"]
