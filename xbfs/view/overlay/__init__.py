"""Writable disks: copy-on-write over disks of restore points, in local files that survive crashes (ADR 0007)."""

from __future__ import annotations

from xbfs.view.overlay.files import is_open
from xbfs.view.overlay.freeze import FrozenOverlay
from xbfs.view.overlay.header import IDENTITY_BYTES_MAX, Header
from xbfs.view.overlay.opening import create_overlay, open_overlay, read_header
from xbfs.view.overlay.overlay import Overlay, freeze_all
from xbfs.view.overlay.regions import Layer, Region

__all__ = [
    "IDENTITY_BYTES_MAX",
    "FrozenOverlay",
    "Header",
    "Layer",
    "Overlay",
    "Region",
    "create_overlay",
    "freeze_all",
    "is_open",
    "open_overlay",
    "read_header",
]
