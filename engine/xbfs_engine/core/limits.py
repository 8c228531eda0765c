"""Every bound in one place, each with its reason."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

CBT_BLOCK_SIZE: Final = 64 * KIB
"""XenServer's changed-block unit; also our chunk size, so a delta is read exactly (xen-api, SM cbtutil)."""

CHUNK_SIZE_DEFAULT: Final = 64 * KIB
CHUNK_SIZE_MAX: Final = 1 * MIB

LEAF_FANOUT: Final = 64
"""Chunks per block map leaf: 4 MiB of disk. Halves what a scattered delta costs against 128; see ADR 0003."""

NODE_FANOUT: Final = 256
"""Children per inner block map node."""

MAP_LEVEL_MAX: Final = 7
"""64 * 256^7 chunks of 64 KiB is far beyond 2^63 bytes: a higher level is damage."""

DISK_SIZE_MAX: Final = 1 << 53
"""8 PiB: beyond any VDI, and exact in JSON numbers."""

PACK_SIZE_TARGET: Final = 32 * MIB
PACK_SIZE_MAX: Final = 128 * MIB
"""Larger packs are refused before anything is allocated."""

PACK_ENTRIES_MAX: Final = 0xFFFF
"""Ordinals are 16 bit in block map nodes."""

PACK_ENTRIES_TARGET: Final = 16 * 1024
"""Chunks after which a pack is closed though it is small: they are a GiB of disk, and the session remembers each."""

OBJECT_SIZE_MAX: Final = 64 * MIB
"""Largest sealed object (index blob, manifest) that is read."""

INDEX_ENTRIES_PER_BLOB: Final = 64 * 1024
"""Entries gathered before an index blob is written: bounds the session's dictionary (about 25 MiB)."""

MAP_PENDING_ENTRIES_MAX: Final = 256 * 1024
"""Chunk places waiting for their pack's name before packs are closed early: bounds memory of a run with many
duplicates and few new chunks."""

SEGMENT_SIZE: Final = 4 * MIB
"""One unit of work of the pipeline: exactly one leaf, and one read of the source."""

DISKS_PER_POINT_MAX: Final = 255
"""VBDs a XenServer VM can have."""

NAME_BYTES_MAX: Final = 200
"""Longest VM name that still leaves room for "~<uuid>" in one path component of 255 bytes."""
