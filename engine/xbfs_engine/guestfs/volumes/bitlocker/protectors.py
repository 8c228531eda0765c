"""What opens a BitLocker volume: the kinds of its key protectors, and how they are called.

The bits are those of libyal, "Key protection types", which combine: TPM and PIN is 0x0500.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.volumes.bitlocker.datums import Protector

CLEAR: Final = 0x0000
TPM: Final = 0x0100
EXTERNAL: Final = 0x0200
PIN: Final = 0x0400
RECOVERY: Final = 0x0800
CERTIFICATE: Final = 0x1000
PASSWORD: Final = 0x2000

_BITS: Final = ((TPM, "a TPM"), (PIN, "a PIN"), (EXTERNAL, "a startup key"), (CERTIFICATE, "a smart card"))
_NAMED_MAX: Final = 8


def ways_in(protectors: Sequence[Protector]) -> str:
    """A sentence on what opens the volume here and what would elsewhere, for whoever has to find the key."""
    here = [words for protector in protectors for words in _here(protector)]
    elsewhere = [words for protector in protectors for words in _elsewhere(protector)]
    sentence = f"it opens with {_listed(here)}" if here else "it opens with no key that can be given here"
    return f"{sentence}; {_listed(elsewhere)} can not be used here" if elsewhere else sentence


def _here(protector: Protector) -> list[str]:
    """Windows shows identifiers in capitals, and asks for recovery passwords by them."""
    identity = protector.uuid.upper()
    return {
        PASSWORD: ["its password"],
        RECOVERY: [f"the recovery password of identifier {identity}"],
        EXTERNAL: [f"the startup key file {identity}.BEK"],
    }.get(protector.kind, [])


def _elsewhere(protector: Protector) -> list[str]:
    if protector.kind in (CLEAR, PASSWORD, RECOVERY, EXTERNAL):
        return []
    known = [words for bit, words in _BITS if protector.kind & bit]
    return [" with ".join(known) or f"a protector of kind {protector.kind:#06x}"]


def _listed(words: Sequence[str]) -> str:
    different = list(dict.fromkeys(words))
    more = len(different) - _NAMED_MAX
    return " or ".join(different[:_NAMED_MAX]) + (f" or {more} more" if more > 0 else "")
