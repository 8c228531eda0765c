"""The Elephant diffuser of BitLocker, backwards.

After N. Ferguson, "AES-CBC + Elephant diffuser: A Disk Encryption Algorithm for Windows Vista" (2006).
Decryption undoes diffuser B, then A. Every sector is diffused for itself, so numpy takes all of a run together, word
by word. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_A_CYCLES: Final = 5
_A_TURNS: Final = (9, 13)
"""Of every second word; the others are not turned."""

_B_CYCLES: Final = 3
_B_TURNS: Final = (0, 10, 0, 25)
_B_REACH: Final = 5
"""A word is mixed with the second and fifth after it; the last ones with the first, which are new by then."""


def undiffuse(sectors: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Sectors as rows of words, a multiple of four and more than five in each."""
    words = np.ascontiguousarray(sectors.T)
    for _ in range(_B_CYCLES):
        _undo_b(words)
    for _ in range(_A_CYCLES):
        _undo_a(words)
    return np.ascontiguousarray(words.T)


def _undo_b(words: NDArray[np.uint32]) -> None:
    count = len(words)
    inner = count - _B_REACH
    turned = words[_B_REACH:].copy()
    for rest, turn in enumerate(_B_TURNS):
        if turn:
            turned[rest::4] = _turned(turned[rest::4], turn)
    turned ^= words[2 : inner + 2]
    words[:inner] += turned
    for at in range(inner, count):
        turn = _B_TURNS[at % 4]
        far = words[at + _B_REACH - count]
        words[at] += words[(at + 2) % count] ^ (_turned(far, turn) if turn else far)


def _undo_a(words: NDArray[np.uint32]) -> None:
    """Each word with the second and fifth before it; negative indices are the wrap that the paper wants."""
    for at in range(0, len(words), 2):
        words[at] += words[at - 2] ^ _turned(words[at - 5], _A_TURNS[at // 2 % 2])
        words[at + 1] += words[at - 1] ^ words[at - 4]


def _turned(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    return words << np.uint32(bits) | words >> np.uint32(32 - bits)
