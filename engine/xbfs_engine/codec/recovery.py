"""Recovery codes: 160 random bits as people write them down and type them back. Pure.

Nine groups of four characters of Crockford's base 32 (no I, L, O, U): 32 characters of secret, then 4 of checksum.
The checksum is the secret, read as a number, modulo a prime above 32: any one wrong character, any two swapped
neighbours and any one wrong checksum character change it, so a typing error is never taken for a wrong code.
"""

from __future__ import annotations

from typing import Final

from xbfs_engine.core.errors import WrongPassphrase

CODE_SECRET_SIZE: Final = 20
"""Bytes of a code's secret: 160 bits, and 32 characters without padding."""

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_MEANT: Final = str.maketrans({"O": "0", "I": "1", "L": "1"})
_SECRET_CHARACTERS: Final = 32
_CHECK_CHARACTERS: Final = 4
_GROUP: Final = 4
_PRIME: Final = 1_048_573
"""The largest prime that fits the 20 bits of four characters."""


def format_code(secret: bytes) -> str:
    """The printed code of ``secret`` (20 random bytes)."""
    assert len(secret) == CODE_SECRET_SIZE
    number = int.from_bytes(secret, "big")
    text = _characters(number, _SECRET_CHARACTERS) + _characters(number % _PRIME, _CHECK_CHARACTERS)
    return "-".join(text[at : at + _GROUP] for at in range(0, len(text), _GROUP))


def looks_like_code(text: str) -> bool:
    """Whether ``text`` has the length and the characters of a recovery code; it may still be mistyped."""
    compact = _compact(text)
    return len(compact) == _SECRET_CHARACTERS + _CHECK_CHARACTERS and all(char in _ALPHABET for char in compact)


def parse_code(text: str) -> bytes:
    """The secret of a typed code; case, spaces and dashes do not matter, O counts as 0, I and L as 1.

    Raises WrongPassphrase if it is no recovery code or has a typing error.
    """
    if not looks_like_code(text):
        raise WrongPassphrase(
            "this is not a recovery code",
            hint="a recovery code has nine groups of four characters; U and signs other than dashes do not occur in it",
        )
    compact = _compact(text)
    number = _number(compact[:_SECRET_CHARACTERS])
    if number % _PRIME != _number(compact[_SECRET_CHARACTERS:]):
        raise WrongPassphrase(
            "the recovery code has a typing error: its checksum does not fit",
            hint="compare what was typed with the printed code, group by group",
        )
    return number.to_bytes(CODE_SECRET_SIZE, "big")


def _compact(text: str) -> str:
    return "".join(char for char in text.upper() if char != "-" and not char.isspace()).translate(_MEANT)


def _characters(number: int, count: int) -> str:
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(count)))


def _number(characters: str) -> int:
    number = 0
    for char in characters:
        number = number << 5 | _ALPHABET.index(char)
    return number
