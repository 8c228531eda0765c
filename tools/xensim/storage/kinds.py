"""Kinds of SR: what the drivers of SM can do, and how they count space (SM features; xen-api, sm_config of LVM)."""

from __future__ import annotations

from typing import Final, NamedTuple

MIB: Final = 1 << 20
GIB: Final = 1 << 30
SIZE_STEP: Final = 2 * MIB
"""VHD SRs round sizes up to this (SM vhdutil.validate_and_round_vhd_size)."""
SIZE_MOST: Final = 2040 * GIB
EXTENT: Final = 4 * MIB
"""Logical volumes, CBT logs in LVM among them, come in steps of this."""

_EVERY: Final = ("scan", "destroy", "forget", "plug", "unplug", "update", "pbd_create", "pbd_destroy")
_VHD: Final = (
    "vdi_create",
    "vdi_introduce",
    "vdi_destroy",
    "vdi_resize",
    "vdi_clone",
    "vdi_snapshot",
    "vdi_mirror",
    "vdi_set_on_boot",
    "vdi_enable_cbt",
    "vdi_disable_cbt",
    "vdi_data_destroy",
    "vdi_list_changed_blocks",
)


class Kind(NamedTuple):
    """A type of SR: operations as in SR.allowed_operations; ``thick``: every disk takes its full size."""

    operations: tuple[str, ...]
    thick: bool = False
    writable: bool = True

    @property
    def cbt(self) -> bool:
        """Whether changed blocks can be tracked."""
        return "vdi_enable_cbt" in self.operations


_THIN = Kind(_EVERY + _VHD)
_THICK = Kind(_EVERY + _VHD, thick=True)
_RAW = Kind((*_EVERY, "vdi_create", "vdi_introduce", "vdi_destroy"), thick=True)
_READ = Kind((*_EVERY, "vdi_introduce"), writable=False)
KINDS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("nfs", "ext", "file", "smb"), _THIN),
    **dict.fromkeys(("lvm", "lvmoiscsi", "lvmohba"), _THICK),
    **dict.fromkeys(("iscsi", "hba"), _RAW),
    **dict.fromkeys(("iso", "udev"), _READ),
}
