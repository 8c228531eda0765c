"""The record of a session: what is written is read, also when an older release wrote it."""

from __future__ import annotations

from dataclasses import replace

from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk, session_of
from xbfs_engine.core.ids import PointId

SESSION = Session(
    "one", PointId("ab"), "web", 1, Export.NBD, (SessionDisk(0, DiskFormat.RAW, "0.raw"),), ("10.0.0.1/32",), 0, True
)


def test_what_is_written_is_read() -> None:
    assert session_of(SESSION.to_record()) == SESSION


def test_records_of_before_there_was_passthrough_are_read() -> None:
    record = SESSION.to_record()
    del record["passthrough"]
    assert session_of(record) == replace(SESSION, passthrough=False)
