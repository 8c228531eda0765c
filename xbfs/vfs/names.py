"""Names in the tree: VM names as path components. Pure."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from xbfs_engine.core.limits import NAME_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Container

TAG_DIGITS: Final = 8

_UNSAFE: Final = frozenset("/\u2028\u2029\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""The separator; line separators; marks that turn the writing direction and so fake other names."""
_CUT_DIGITS: Final = 10


def safe_component(name: str) -> str:
    """``name`` as one path component of 1 to 200 bytes: the same for the same name, but not different for different.

    Control characters, surrogates and "/" become "_"; a name too long is cut and gets a hash of all of it.
    """
    safe = "".join("_" if c in _UNSAFE or unicodedata.category(c) in {"Cc", "Cs"} else c for c in name)
    if safe in {"", ".", ".."}:
        safe = "_" + safe
    encoded = safe.encode()
    if len(encoded) <= NAME_BYTES_MAX:
        return safe
    kept = encoded[: NAME_BYTES_MAX - 1 - _CUT_DIGITS].decode(errors="ignore")
    return f"{kept}~{_digest(name, _CUT_DIGITS)}"


def free_name(wanted: str, identity: str, taken: Container[str]) -> str:
    """``wanted``, or where that is taken ``wanted~<first 8 of identity>``, or a name with a hash that is free."""
    if wanted not in taken:
        return wanted
    tagged = f"{wanted}~{safe_component(identity)[:TAG_DIGITS]}"
    number = 0
    while tagged in taken:
        tagged = f"{wanted}~{_digest(f'{number}/{identity}', 2 * TAG_DIGITS)}"
        number += 1
    return tagged


def _digest(text: str, digits: int) -> str:
    return blake3(text.encode(errors="surrogatepass")).hexdigest()[:digits]
