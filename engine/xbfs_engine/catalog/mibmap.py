"""Which MiBs of a disk hold data, kept small: a catalog holds one for every disk of every restore point. Immutable."""

from __future__ import annotations

import zlib
from typing import Final

_PLAIN_MAX: Final = 512
"""Maps up to this size (4 GiB of disk) are kept as they are."""


class MibMap:
    """``bits``: bit i of byte i//8, from the most significant, is set where MiB i holds data.

    A disk of 2 TiB has 256 KiB of bits; deflated they are rarely more than some KiB, as data lies together.
    """

    __slots__ = ("_deflated", "_kept", "mibs")

    def __init__(self, bits: bytes) -> None:
        self.mibs = int.from_bytes(bits, "big").bit_count()
        self._deflated = len(bits) > _PLAIN_MAX
        self._kept = zlib.compress(bits, 1) if self._deflated else bits

    def bits(self) -> bytes:
        """The bits, inflated at every call."""
        return zlib.decompress(self._kept) if self._deflated else self._kept

    def __eq__(self, other: object) -> bool:
        return self.bits() == other.bits() if isinstance(other, MibMap) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.mibs, len(self._kept)))

    def __repr__(self) -> str:
        return f"MibMap({self.mibs} MiB)"
