"""A registry hive of Windows: keys by path, and their values.

Layout: "REGF" as described by Suhanov's *Windows registry file format specification* and Metz' *libregf*: a base block
of 4096 bytes, then cells, named by their offset after it: an int32 size, negative if in use, and the content. All
integers are little-endian. Only the primary file is read: what its logs hold beyond it is missing, and told.

Hives are hostile: offsets, sizes and counts are bounded before they are used, no list is followed deeper than the
format allows, and every error is GuestDamaged or what ``read`` raises. One thread at a time.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HIVE_BYTES_MAX: Final = 64 << 20
"""Larger hives are refused; that of the system has some 20 MiB."""

_BASE_BYTES: Final = 4096
_BASE: Final = struct.Struct("<4sII8sIIIIII")
_KEY: Final = struct.Struct("<2sH8s15I2H")
_VALUE: Final = struct.Struct("<2sHIIIHH")
_KEY_NAME_IS_LATIN: Final = 0x20
_VALUE_NAME_IS_LATIN: Final = 0x01
_RESIDENT: Final = 1 << 31
_NONE: Final = 0xFFFFFFFF
_CELL_BYTES_MAX: Final = 1 << 20
_SEGMENT_BYTES: Final = 16344
"""Longer data of a value is kept in segments of this size, listed by a ``db`` cell (from version 1.4 on)."""

_KEYS_MAX: Final = 1 << 16
_VALUES_MAX: Final = 1 << 14
_PAGE_BYTES: Final = 16 << 10
_PAGES_MAX: Final = 256

assert _BASE.size == 44
assert _KEY.size == 76
assert _VALUE.size == 20


class Value(NamedTuple):
    """A value of a key."""

    name: str
    """Empty for the key's default value."""
    type: int
    """REG_SZ 1, REG_BINARY 3, REG_DWORD 4 …"""
    data: bytes


class Key(NamedTuple):
    """A key; what belongs to it is named by offsets of cells."""

    name: str
    subkey_count: int
    subkeys_at: int
    value_count: int
    values_at: int


class Hive:
    """A hive of ``size_bytes`` bytes; ``read`` gives exactly the bytes at (offset, length). GuestDamaged,
    GuestUnsupported: it is none that is read here."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int) -> None:
        if size_bytes > HIVE_BYTES_MAX:
            raise GuestUnsupported(f"the hive has {size_bytes} bytes; more than {HIVE_BYTES_MAX} are not read")
        self._read = read
        self._size = size_bytes
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        if size_bytes < _BASE_BYTES:
            raise GuestDamaged(f"the hive has only {size_bytes} bytes")
        magic, first, second, _, major, _, kind, _, root, _ = _BASE.unpack(self._bytes(0, _BASE.size))
        if magic != b"regf" or kind:
            raise GuestDamaged("it is no primary registry hive")
        if major != 1:
            raise GuestUnsupported(f"the hive has version {major}")
        self.is_dirty: bool = first != second
        """Windows was writing it: the last changes are in its logs only."""
        self.root: Key = self._key(root)

    def find(self, path: Sequence[str]) -> Key | None:
        """A key by its names below the root, whatever their case."""
        key = self.root
        for name in path:
            wanted = name.casefold()
            below = next((found for found in self.subkeys(key) if found.name.casefold() == wanted), None)
            if below is None:
                return None
            key = below
        return key

    def subkeys(self, key: Key) -> Iterator[Key]:
        """The keys in a key, in their order."""
        if not key.subkey_count or key.subkeys_at == _NONE:
            return
        for count, at in enumerate(self._leaves(key.subkeys_at)):
            if count == _KEYS_MAX:
                raise GuestUnsupported(f"key {key.name!r} has more than {_KEYS_MAX} keys")
            yield self._key(at)

    def values(self, key: Key) -> Iterator[Value]:
        """The values of a key, in their order."""
        if not key.value_count or key.values_at == _NONE:
            return
        if key.value_count > _VALUES_MAX:
            raise GuestUnsupported(f"key {key.name!r} has {key.value_count} values")
        for at in self._offsets(self._cell(key.values_at), 0, key.value_count):
            yield self._value(at)

    def _key(self, at: int) -> Key:
        cell = self._cell(at)
        if len(cell) < _KEY.size or cell[:2] != b"nk":
            raise GuestDamaged(f"the cell at {at:#x} is no key")
        fields = _KEY.unpack_from(cell)
        flags, name_bytes = fields[1], fields[-2]
        name = _name(cell, _KEY.size, name_bytes, is_latin=bool(flags & _KEY_NAME_IS_LATIN))
        return Key(name, fields[5], fields[7], fields[9], fields[10])

    def _value(self, at: int) -> Value:
        cell = self._cell(at)
        if len(cell) < _VALUE.size or cell[:2] != b"vk":
            raise GuestDamaged(f"the cell at {at:#x} is no value")
        _, name_bytes, size, data_at, kind, flags, _ = _VALUE.unpack_from(cell)
        name = _name(cell, _VALUE.size, name_bytes, is_latin=bool(flags & _VALUE_NAME_IS_LATIN))
        if size & _RESIDENT:
            return Value(name, kind, cell[8 : 8 + min(size & ~_RESIDENT, 4)])
        return Value(name, kind, self._data(data_at, size) if size else b"")

    def _data(self, at: int, size: int) -> bytes:
        if size > _CELL_BYTES_MAX:
            raise GuestUnsupported(f"a value has {size} bytes")
        cell = self._cell(at)
        if size > _SEGMENT_BYTES and cell[:2] == b"db" and len(cell) >= 8:
            count, segments_at = struct.unpack_from("<HI", cell, 2)
            offsets = self._offsets(self._cell(segments_at), 0, min(count, -(-size // _SEGMENT_BYTES)))
            cell = b"".join(self._cell(offset)[:_SEGMENT_BYTES] for offset in offsets)
        if len(cell) < size:
            raise GuestDamaged(f"the data of a value at {at:#x} has {len(cell)} bytes of {size}")
        return cell[:size]

    def _leaves(self, at: int) -> Iterator[int]:
        """Offsets of the keys in a list of keys, which may be a list of lists."""
        kind, cell, count = self._list(at)
        if kind == b"ri":
            for leaf in self._offsets(cell, 4, count):
                inner, content, length = self._list(leaf)
                if inner == b"ri":
                    raise GuestDamaged(f"the list of keys at {at:#x} is too deep")
                yield from self._offsets(content, 4, length, 4 if inner == b"li" else 8)
        else:
            yield from self._offsets(cell, 4, count, 4 if kind == b"li" else 8)

    def _list(self, at: int) -> tuple[bytes, bytes, int]:
        cell = self._cell(at)
        if len(cell) < 4 or cell[:2] not in (b"lf", b"lh", b"li", b"ri"):
            raise GuestDamaged(f"the cell at {at:#x} is no list of keys")
        return cell[:2], cell, int.from_bytes(cell[2:4], "little")

    def _offsets(self, cell: bytes, start: int, count: int, step: int = 4) -> list[int]:
        if start + count * step > len(cell):
            raise GuestDamaged(f"a list of {count} cells has only {len(cell)} bytes")
        return [int.from_bytes(cell[i : i + 4], "little") for i in range(start, start + count * step, step)]

    def _cell(self, at: int) -> bytes:
        """The content of a cell in use."""
        start = _BASE_BYTES + at
        size = -int.from_bytes(self._bytes(start, 4), "little", signed=True)
        if not 8 <= size <= _CELL_BYTES_MAX:
            raise GuestDamaged(f"the cell at {at:#x} has size {-size}")
        return self._bytes(start + 4, size - 4)

    def _bytes(self, start: int, length: int) -> bytes:
        if start + length > self._size:
            raise GuestDamaged(f"{length} bytes at {start:#x} are outside of the hive's {self._size}")
        first, last = start // _PAGE_BYTES, (start + length - 1) // _PAGE_BYTES
        data = b"".join(self._page(number) for number in range(first, last + 1))
        return data[start - first * _PAGE_BYTES :][:length]

    def _page(self, number: int) -> bytes:
        page = self._pages.pop(number, None)
        if page is None:
            at = number * _PAGE_BYTES
            length = min(_PAGE_BYTES, self._size - at)
            page = self._read(at, length)
            if len(page) != length:
                raise GuestDamaged(f"the hive ends before byte {at + length}")
            if len(self._pages) >= _PAGES_MAX:
                self._pages.popitem(last=False)
        self._pages[number] = page
        return page


def _name(cell: bytes, at: int, length: int, *, is_latin: bool) -> str:
    raw = cell[at : at + length]
    if len(raw) != length:
        raise GuestDamaged(f"a name of {length} bytes is longer than its cell")
    return raw.decode("latin-1") if is_latin else raw.decode("utf-16-le", "replace")
