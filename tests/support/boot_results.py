"""Results of boot tests to put into a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.catalog.boottests import BootTest, Signal, Verdict

if TYPE_CHECKING:
    from xbfs_engine.core.ids import PointId


def boot_test(point: PointId, made_ns: int, *, console: str = "web login:", screenshot: bytes = b"") -> BootTest:
    """A system that runs."""
    return BootTest(
        point=point,
        made_ns=made_ns,
        verdict=Verdict.BOOTED,
        reason="a login prompt",
        signals=(Signal("console", "for", "a login prompt"),),
        elapsed_ms=9000,
        output_ms=300,
        marker_ms=None,
        accelerator="tcg",
        firmware="bios",
        program="xbfs",
        node="n",
        console=console,
        screenshot=screenshot,
    )
