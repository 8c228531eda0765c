"""Trying keys on an encrypted volume, whichever program encrypted it, and saying why none fits.

Each try costs as much time and memory as the volume's header asks for, within the bounds of `luks` and `bitlocker`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.errors import GuestLocked, XbfsError
from xbfs_engine.guestfs.volumes import bitlocker, luks
from xbfs_engine.guestfs.volumes.bitlocker import BitLockerHeader
from xbfs_engine.guestfs.volumes.records import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.luks import LuksHeader


class Attempt(NamedTuple):
    """What came of it."""

    plain: BlockSource | None
    """The plaintext, if a key fits."""
    status: VolumeStatus
    """Of the volume if none does."""
    words: str
    """Why none does; or what should be known of one that is open."""


def attempt(source: BlockSource, header: LuksHeader | BitLockerHeader, secrets: Sequence[bytes]) -> Attempt:
    """Open a volume with the first secret that fits. Raises only what a retry may mend."""
    if header.problem:
        return Attempt(None, VolumeStatus.UNREADABLE, header.problem)
    hindrance = ""
    alone = (None,) if isinstance(header, BitLockerHeader) else ()
    for secret in (*alone, *secrets):
        try:
            plain = _opened(source, header, secret)
        except GuestLocked as error:
            hindrance = error.message
        except XbfsError as error:
            if error.retryable:
                raise
            return Attempt(None, VolumeStatus.UNREADABLE, error.message)
        else:
            if plain is not None:
                words = "BitLocker is suspended: it opens without a key" if secret is None else ""
                return Attempt(plain, VolumeStatus.OTHER, words)
    words = "no key that was given opens it" if secrets else "it is encrypted and no key was given"
    return Attempt(None, VolumeStatus.LOCKED, "; ".join(filter(None, (words, hindrance, _ways_in(header)))))


def _ways_in(header: LuksHeader | BitLockerHeader) -> str:
    if isinstance(header, BitLockerHeader):
        return bitlocker.ways_in(header.protectors)
    keepers = " and ".join(repr(keeper) for keeper in header.keepers)
    return f"{keepers} may hold the keys of it, and can not be asked here" if keepers else ""


def _opened(source: BlockSource, header: LuksHeader | BitLockerHeader, secret: bytes | None) -> BlockSource | None:
    if isinstance(header, BitLockerHeader):
        return bitlocker.unlock(source, header, secret)
    return None if secret is None else luks.unlock(source, header, secret)
