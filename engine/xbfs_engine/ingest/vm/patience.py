"""The patience of the backup cycle: that of all who talk to a pool (``source.xapi.patience``)."""

from __future__ import annotations

from xbfs_engine.source.xapi.patience import BUSY_LIMIT_S, Patience

__all__ = ["BUSY_LIMIT_S", "Patience"]
