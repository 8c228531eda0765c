"""The versions of XAPI that are simulated, by name."""

from __future__ import annotations

from typing import Final

from .context import Release

_BEFORE_21_4: Final = {"VM.snapshot": 2}  # ignore_vdis came with xapi 21.4.0

RELEASES: Final = {
    release.name: release
    for release in (
        Release("8.3", "XCP-ng", "8.3.0", 21, "25.6.0"),
        Release("xs8", "XenServer", "8.4.0", 21, "25.6.0"),
        Release("8.2", "XCP-ng", "8.2.1", 16, "1.249.38", max_params=_BEFORE_21_4, missing=frozenset({"VTPM.create"})),
        Release(
            "7.6", "XenServer", "7.6.0", 11, "1.110.1", max_params=_BEFORE_21_4, missing=frozenset({"VTPM.create"})
        ),
    )
}
DEFAULT: Final = "8.3"
