"""The bridge to fs_explorer: how it gets its bytes, how it is kept to pure Python, and what becomes of its errors.

Every call into the library goes through ``guarded``, every step of its iterators through ``steps``: outside of them it
would look for compiled helpers, and its exceptions would be nobody's.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from fs_explorer.errors import CorruptDataError, MissingCodecError, NotAFileError, UnsupportedFormatError
from fs_explorer.io import cancel
from fs_explorer.io.cache import Cache
from fs_explorer.io.parallel import Pool
from fs_explorer.io.source import CachedRA, RandomAccess
from fs_explorer.io.stats import Stats
from fs_explorer.tree import Context

from xbfs_engine.core.errors import GuestDamaged, GuestLocked, GuestUnsupported, GuestWrongKind, XbfsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.formats.source import BlockSource

BACKEND: Final = "pure"

_CACHE_BYTES: Final = 32 << 20
_PIECE_BYTES_MAX: Final = 64 << 20
"""Longest piece the library may ask for at once: no structure of a sound filesystem is longer."""

_STEP_ITEMS: Final = 64

_Item = TypeVar("_Item")


class _Clipped(RandomAccess):
    """The volume for the cache, which asks for whole blocks also where it ends."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self.size = source.size_bytes

    def read_at(self, off: int, n: int) -> bytes:
        return self._source.read_at(off, min(n, self.size - off))


class VolumeBytes(CachedRA):
    """The volume for the library: it fills up short reads with zeros, so there are none."""

    def __init__(self, source: BlockSource, cache: Cache) -> None:
        super().__init__(_Clipped(source), cache)

    def read_at(self, off: int, n: int) -> bytes:
        """Exactly ``n`` bytes; CorruptDataError where the volume does not have them."""
        if n <= 0:
            return b""
        if off < 0 or off + n > self.size:
            raise CorruptDataError(f"bytes {off}+{n} are outside the volume of {self.size}")
        if n > _PIECE_BYTES_MAX:
            raise CorruptDataError(f"a structure of {n} bytes")
        return super().read_at(off, n)


def encrypted(what: str) -> GuestLocked:
    """The error for a file that the guest encrypted by itself, on a volume that is open."""
    return GuestLocked(what, hint="read it with the guest's own system: its users' keys are not kept on the volume")


def make_context() -> Context:
    """What the library's readers share: a bounded cache, and no threads."""
    stats = Stats()
    return Context(cache=Cache(_CACHE_BYTES, stats), stats=stats, backend=BACKEND, pool=Pool(1))


class guarded:
    """Runs library code: in pure Python, its errors turned into ours."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = cancel.enter(None, backend=BACKEND)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        cancel.leave(self._token)
        if not isinstance(error, Exception) or isinstance(error, XbfsError):
            return
        if isinstance(error, UnsupportedFormatError | MissingCodecError):
            raise GuestUnsupported(str(error)) from error
        if isinstance(error, NotAFileError):
            raise GuestWrongKind(str(error)) from error
        # Whatever else a parser trips over in a hostile image is damage: struct.error, IndexError, MemoryError …
        raise GuestDamaged(str(error) or type(error).__name__) from error


def steps(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, made under ``guarded``, some at a time; those before an error come before it."""
    while True:
        made: list[_Item] = []
        problem: XbfsError | None = None
        try:
            with guarded():
                made.extend(islice(items, _STEP_ITEMS))
        except XbfsError as exc:
            problem = exc
        yield from made
        if problem is not None:
            raise problem
        if len(made) < _STEP_ITEMS:
            return
