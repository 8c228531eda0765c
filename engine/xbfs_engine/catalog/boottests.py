"""The results of boot tests: signed records of their own beside a restore point, put, listed and read.

A result is ``tests/<point id>/<time>``: a sealed object (kind boot test) whose payload is {version, body, signature},
like a file index: whoever knows the repository's public keys could else plant a good verdict. No point needs it.
docs/format.md, "Boot test". Any thread may use it: it keeps nothing.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import KEY_SIZE, ObjectKind, open_object, seal_object
from xbfs_engine.core.errors import BlobExists, BlobNotFound, FormatTooNew, IntegrityError, KeyNotHeld, StorageError
from xbfs_engine.core.ids import ID_SIZE, PointId
from xbfs_engine.core.limits import KIB, MIB

if TYPE_CHECKING:
    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.runtime import RandomSource
    from xbfs_engine.storage.base import Storage
    from xbfs_engine.store.repository import Repository

PREFIX: Final = "tests/"
NAME: Final = re.compile(r"tests/([0-9a-f]{64})/([0-9]{20})")
VERSION: Final = 1
_CONTEXT: Final = b"xbfs boot test v1\0"

KEPT: Final = 16
"""Results of one point; the oldest are deleted for new ones, where the storage allows it."""
SIGNALS_MAX: Final = 64
TEXT_MAX: Final = 1024
"""Characters of a reason or a signal's reading."""
CONSOLE_MAX: Final = 16 * KIB
"""Characters of the console: its last ones."""
SCREENSHOT_MAX: Final = 4 * MIB
"""Bytes of the PNG."""
BLOB_MAX: Final = 8 * MIB
_TIME_NS_MAX: Final = 1 << 63
_ELAPSED_MS_MAX: Final = 1 << 40
_TRIES: Final = 8


class Verdict(StrEnum):
    """What a test found: a system that runs, one that does not, or neither could be shown."""

    BOOTED = "booted"
    FAILED = "failed"
    UNCLEAR = "unclear"


class Signal(NamedTuple):
    """One thing that was looked at, and what it showed; ``speaks``: "for", "against" or "" (nothing)."""

    name: str
    speaks: str
    reading: str


@dataclass(frozen=True, slots=True)
class BootTest:
    """The result of one test. ``output_ms`` and ``marker_ms``: from the start to the first text on the console, and to
    what decided for it there; None if none came. ``screenshot``: PNG, empty if there is none."""

    point: PointId
    made_ns: int
    verdict: Verdict
    reason: str
    signals: tuple[Signal, ...]
    elapsed_ms: int
    output_ms: int | None
    marker_ms: int | None
    accelerator: str
    firmware: str
    program: str
    node: str
    console: str
    screenshot: bytes

    def to_record(self) -> dict[str, wire.Value]:
        """All but console and screenshot, as plain values."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "signals": [
                {"name": signal.name, "speaks": signal.speaks, "reading": signal.reading} for signal in self.signals
            ],
            "elapsed_ms": self.elapsed_ms,
            "output_ms": self.output_ms,
            "marker_ms": self.marker_ms,
            "accelerator": self.accelerator,
            "firmware": self.firmware,
            "program": self.program,
            "node": self.node,
        }


class Listed(NamedTuple):
    """A result as listed."""

    point: PointId
    name: str
    size_bytes: int

    @property
    def made_ns(self) -> int:
        """When it was made, by its name, which anybody with the storage can give it."""
        return min(int(self.name.rpartition("/")[2]), _TIME_NS_MAX)


def put_boot_test(repository: Repository, test: BootTest) -> None:
    """Store a result, durably. Raises KeyNotHeld, StorageError."""
    test = _fitted(test)
    storage = repository.storage
    blob = seal_boot_test(repository.keys, repository.runtime.random, test)
    for later in range(_TRIES):
        with suppress(BlobExists):
            storage.put(f"{PREFIX}{test.point}/{test.made_ns + later:020d}", [blob])
            break
    else:
        raise BlobExists(f"there are results of boot tests of {test.point[:12]} for this very moment")
    for old in sorted(listed_tests(storage, test.point))[:-KEPT]:
        with suppress(StorageError):
            storage.delete(old.name)


def listed_tests(storage: Storage, point: PointId | None = None) -> list[Listed]:
    """The results there are, of one point or of all; of a point the newest is last. Raises StorageError."""
    found = []
    for blob in storage.list_blobs(PREFIX if point is None else f"{PREFIX}{point}/"):
        match = NAME.fullmatch(blob.name)
        if match:
            found.append(Listed(PointId(match[1]), blob.name, blob.size_bytes))
    return sorted(found)


def read_boot_test(repository: Repository, listed: Listed) -> BootTest:
    """One result. Raises IntegrityError, FormatTooNew; BlobNotFound if it was deleted; StorageError."""
    if listed.size_bytes > BLOB_MAX:
        raise IntegrityError(f"{listed.name} has {listed.size_bytes} bytes: more than {BLOB_MAX}")
    blob = repository.storage.read(listed.name, 0, listed.size_bytes)
    return open_boot_test(repository.keys, listed.point, blob)


def boot_tests_of(repository: Repository, point: PointId) -> list[BootTest]:
    """The readable results of a point, the newest last. Raises StorageError."""
    found = []
    for listed in listed_tests(repository.storage, point):
        with suppress(IntegrityError, FormatTooNew, BlobNotFound):
            found.append(read_boot_test(repository, listed))
    return found


def seal_boot_test(keys: KeySet, random: RandomSource, test: BootTest) -> bytes:
    """The blob of a result. Raises KeyNotHeld."""
    if keys.signing_private is None:
        raise KeyNotHeld("this role can not sign results of boot tests")
    record = test.to_record() | {
        "point": bytes.fromhex(test.point),
        "made_ns": test.made_ns,
        "console": test.console,
        "screenshot": test.screenshot,
    }
    body = wire.encode(record)
    signature = Ed25519PrivateKey.from_private_bytes(keys.signing_private).sign(_CONTEXT + keys.repository_id + body)
    payload = wire.encode({"version": VERSION, "body": body, "signature": signature})
    return seal_object(keys, ObjectKind.BOOT_TEST, payload, random.token(KEY_SIZE))


def open_boot_test(keys: KeySet, point: PointId, blob: bytes) -> BootTest:
    """Decode and check a blob that lies under the name of ``point``. Raises IntegrityError, FormatTooNew."""
    what = f"boot test of {point[:12]}"
    envelope = wire.decode(open_object(keys, ObjectKind.BOOT_TEST, blob, what), what, size_max=BLOB_MAX)
    envelope.version(VERSION)
    body = envelope.raw("body", size_max=BLOB_MAX)
    signature = envelope.raw("signature", 64)
    envelope.done()
    try:
        Ed25519PublicKey.from_public_bytes(keys.signing_public).verify(signature, _CONTEXT + keys.repository_id + body)
    except InvalidSignature as exc:
        raise IntegrityError(f"{what}: its signature does not hold") from exc
    return _from_record(point, wire.decode(body, what, size_max=BLOB_MAX), what)


def _from_record(point: PointId, record: wire.Record, what: str) -> BootTest:
    if record.raw("point", ID_SIZE).hex() != point:
        raise IntegrityError(f"{what} is that of another restore point")
    verdict = record.text("verdict", 16)
    if verdict not in frozenset(Verdict):
        raise IntegrityError(f"{what} has the unknown verdict {verdict!r}")
    test = BootTest(
        point=point,
        made_ns=record.integer("made_ns", 0, _TIME_NS_MAX),
        verdict=Verdict(verdict),
        reason=record.text("reason", TEXT_MAX),
        signals=tuple(_signal(signal) for signal in record.records("signals", SIGNALS_MAX)),
        elapsed_ms=record.integer("elapsed_ms", 0, _ELAPSED_MS_MAX),
        output_ms=_moment(record, "output_ms"),
        marker_ms=_moment(record, "marker_ms"),
        accelerator=record.text("accelerator", 64),
        firmware=record.text("firmware", 64),
        program=record.text("program", 64),
        node=record.text("node", 256),
        console=record.text("console", CONSOLE_MAX),
        screenshot=record.raw("screenshot", size_max=SCREENSHOT_MAX),
    )
    record.done()
    return test


def _moment(record: wire.Record, key: str) -> int | None:
    return record.integer(key, 0, _ELAPSED_MS_MAX) if record.optional(key) else None


def _signal(record: wire.Record) -> Signal:
    signal = Signal(record.text("name", 64), record.text("speaks", 16), record.text("reading", TEXT_MAX))
    record.done()
    return signal


def _fitted(test: BootTest) -> BootTest:
    """With texts, which a guest may have made, as long and as valid as a record may have them."""
    return BootTest(
        point=test.point,
        made_ns=test.made_ns,
        verdict=test.verdict,
        reason=_text(test.reason),
        signals=tuple(Signal(*map(_text, signal)) for signal in test.signals[:SIGNALS_MAX]),
        elapsed_ms=test.elapsed_ms,
        output_ms=test.output_ms,
        marker_ms=test.marker_ms,
        accelerator=_text(test.accelerator)[:64],
        firmware=_text(test.firmware)[:64],
        program=_text(test.program)[:64],
        node=_text(test.node)[:256],
        console=_valid(test.console)[-CONSOLE_MAX:],
        screenshot=test.screenshot if len(test.screenshot) <= SCREENSHOT_MAX else b"",
    )


def _text(text: str) -> str:
    return _valid(text)[:TEXT_MAX]


def _valid(text: str) -> str:
    return text.encode(errors="replace").decode()
