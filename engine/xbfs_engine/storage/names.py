"""What callers may ask of a storage: the rules for blob names, list prefixes and ranges, one for all backends.

Pure. A breach is a bug of the caller, but names come from stored records too, so it is reported as StorageError.
"""

from __future__ import annotations

import re
from typing import Final

from xbfs_engine.core.errors import StorageError

NAME_COMPONENTS_MAX: Final = 4
NAME_SIZE_MAX: Final = 200
"""Bytes of a whole name: leaves room for a root within PATH_MAX, and for S3's 1024 bytes with any prefix."""

RESERVED: Final = "tmp"
"""First component that is no blob's: where the local storage keeps its temporary files."""

_COMPONENT = re.compile(r"[a-z0-9][a-z0-9._-]*")


def check_name(name: str) -> str:
    """Return ``name`` if it is a blob name, else raise StorageError.

    A blob name is 1 to 4 components ``[a-z0-9][a-z0-9._-]*`` joined by "/", at most 200 bytes, without ".." and not
    below ``tmp``.
    """
    if not is_name(name):
        raise StorageError(f"{name[:NAME_SIZE_MAX]!r} is not a blob name")
    return name


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it can be listed (empty, or components each with "/"), else raise StorageError."""
    if not is_prefix(prefix):
        raise StorageError(f"{prefix[:NAME_SIZE_MAX]!r} is not a prefix of blob names that ends with a slash")
    return prefix


def check_range(name: str, size_bytes: int, offset: int, length: int) -> None:
    """Raise StorageError unless [offset, offset+length) lies within the ``size_bytes`` of blob ``name``."""
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise StorageError(f"blob {name} has {size_bytes} bytes: can not read {length} bytes from {offset}")


def is_name(text: str) -> bool:
    """Whether ``text`` is a blob name; see ``check_name``."""
    return _is_path(text, NAME_COMPONENTS_MAX)


def is_prefix(text: str) -> bool:
    """Whether blobs can be listed by this prefix; see ``check_prefix``."""
    return not text or (text.endswith("/") and _is_path(text[:-1], NAME_COMPONENTS_MAX - 1))


def _is_path(text: str, components_max: int) -> bool:
    components = text.split("/", components_max)
    return (
        len(text) <= NAME_SIZE_MAX
        and len(components) <= components_max
        and components[0] != RESERVED
        and ".." not in text
        and all(_COMPONENT.fullmatch(component) for component in components)
    )
