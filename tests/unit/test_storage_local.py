"""The local storage: what the contract of all storages does not ask."""

from __future__ import annotations

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.runtime import FixedClock
from xbfs_engine.core.errors import (
    BlobExists,
    BlobNotFound,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from xbfs_engine.storage import local
from xbfs_engine.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    return LocalStorage(root)


def descriptors_below(path: Path) -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum(1 for link in links if link.is_symlink() and path in link.readlink().parents)


def fail(number: int) -> Callable[..., None]:
    def raise_error(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_error


def leftovers(root: Path) -> list[str]:
    return [path.name for path in (root / "tmp").iterdir()]


class TestTree:
    def test_blobs_are_private_files_under_their_names(self, storage: LocalStorage, root: Path) -> None:
        storage.put("data/ab/abcd", [b"x"])
        assert (root / "data/ab/abcd").read_bytes() == b"x"
        assert stat.S_IMODE((root / "data/ab/abcd").stat().st_mode) == 0o600
        for directory in (root, root / "data", root / "data/ab", root / "tmp"):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert leftovers(root) == []

    def test_another_process_sees_them(self, storage: LocalStorage, root: Path) -> None:
        storage.put("a/b", [b"x"])
        assert LocalStorage(root).get("a/b") == b"x"

    def test_a_change_of_directory_does_not_move_it(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root.mkdir()
        monkeypatch.chdir(root.parent)
        storage = LocalStorage(Path(root.name))
        monkeypatch.chdir("/")
        storage.put("a", [b"x"])
        assert (root / "a").exists()
        assert storage.location() == str(root)

    def test_foreign_files_are_neither_listed_nor_read(self, storage: LocalStorage, root: Path, tmp_path: Path) -> None:
        storage.put("data/a", [b"x"])
        (tmp_path / "secret").write_bytes(b"secret")
        (root / "data/README").write_bytes(b"x")
        (root / "data/.hidden").write_bytes(b"x")
        (root / "lost+found").mkdir()
        (root / "lost+found/a").write_bytes(b"x")
        (root / "data/deep/er/and").mkdir(parents=True)
        (root / "data/deep/er/and/a").write_bytes(b"x")
        (root / "tmp/a").write_bytes(b"x")
        (root / "data/link").symlink_to(tmp_path / "secret")
        (root / "linked").symlink_to(root / "data")
        os.mkfifo(root / "data/fifo")
        Path(os.fsdecode(os.fsencode(root / "data") + b"/\xff")).write_bytes(b"x")
        assert [blob.name for blob in storage.list_blobs("")] == ["data/a"]
        for name in ("data/link", "data/fifo", "data/deep", "data"):
            for call in (storage.get, storage.size, storage.delete, lambda name: storage.read(name, 0, 1)):
                with pytest.raises(BlobNotFound):
                    call(name)

    def test_foreign_directories_are_not_entered(
        self, storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Entering lost+found fails for anyone but root."""
        storage.put("data/a", [b"x"])
        (root / "lost+found").mkdir()
        entered: list[str] = []
        scandir = os.scandir

        def log_scandir(path: Path) -> object:
            entered.append(path.name)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", log_scandir)
        assert [blob.name for blob in storage.list_blobs("")] == ["data/a"]
        assert entered == [root.name, "data"]

    def test_what_is_in_the_way_of_a_directory_is_an_error(self, storage: LocalStorage, root: Path) -> None:
        storage.put("a", [b"x"])
        with pytest.raises(StorageError, match="not a directory") as caught:
            storage.put("a/b", [b"y"])
        assert not isinstance(caught.value, BlobExists)
        with pytest.raises(StorageError, match="not a directory"):
            LocalStorage(root / "a").put("b", [b"y"])

    def test_a_directory_that_went_away_is_not_made_again(self, storage: LocalStorage, root: Path) -> None:
        """It may be the mount of the storage: what is written below it then would be lost."""
        storage.put("a", [b"x"])
        root.rename(root.parent / "unmounted")
        with pytest.raises(StorageUnavailable, match="gone") as caught:
            storage.put("b", [b"x"])
        assert "mounted" in caught.value.hint
        assert not root.exists()

    def test_a_refusing_directory_is_reported_as_such(self) -> None:
        with pytest.raises(StorageDenied, match="/sys/xbfs"):
            LocalStorage(Path("/sys/xbfs")).put("a", [b"x"])


class TestReading:
    def test_a_blob_that_lost_its_end_is_never_read_short(self, storage: LocalStorage, root: Path) -> None:
        storage.put("data/a", [bytes(100)])
        assert storage.read("data/a", 90, 10) == bytes(10)
        os.truncate(root / "data/a", 60)
        for reader in (storage, LocalStorage(root)):
            for offset in (0, 50, 90):
                with pytest.raises(StorageError, match=r"data/a has 60 bytes"):
                    reader.read("data/a", offset, 100 - offset)
            assert reader.read("data/a", 40, 20) == bytes(20)

    def test_open_files_are_bounded_and_closed_in_the_end(
        self, storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local, "OPEN_FILES_MAX", 5)
        for number in range(20):
            storage.put(f"a/{number}", [b"%2d" % number])
        assert descriptors_below(root) == 0
        for _ in range(2):
            for number in range(20):
                assert storage.read(f"a/{number}", 0, 2) == b"%2d" % number
        assert descriptors_below(root) == 5
        del storage._open_files  # what the end of the storage does; fixtures hold the storage itself
        assert descriptors_below(root) == 0

    def test_the_blobs_read_last_stay_open(
        self, storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local, "OPEN_FILES_MAX", 2)
        for name in ("a", "b", "c"):
            storage.put(name, [b"x"])
        for name in ("a", "b", "a", "c"):
            storage.read(name, 0, 1)
        for name in ("a", "b", "c"):
            (root / name).unlink()
        assert storage.read("a", 0, 1) == storage.read("c", 0, 1) == b"x"
        with pytest.raises(BlobNotFound):
            storage.read("b", 0, 1)

    def test_eviction_never_closes_a_file_under_a_reader(
        self, storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local, "OPEN_FILES_MAX", 2)
        reading, go_on = threading.Event(), threading.Event()
        pread = os.pread

        def slow_pread(fd: int, length: int, offset: int) -> bytes:
            if length == 7:
                reading.set()
                assert go_on.wait(10)
            return pread(fd, length, offset)

        for number in range(10):
            storage.put(f"a/{number}", [bytes([number]) * 100])
        monkeypatch.setattr(os, "pread", slow_pread)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(storage.read, "a/0", 0, 7)
            assert reading.wait(10)
            for number in range(1, 10):
                assert storage.read(f"a/{number}", 0, 1) == bytes([number])
            assert descriptors_below(root) == 3
            go_on.set()
            assert slow.result() == bytes(7)
        assert descriptors_below(root) == 2

    def test_many_readers_of_more_blobs_than_stay_open(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local, "OPEN_FILES_MAX", 2)
        for number in range(10):
            storage.put(f"a/{number}", [bytes([number]) * 100])

        def read(turn: int) -> bool:
            number = turn * 7 % 10
            return storage.read(f"a/{number}", turn % 90, 10) == bytes([number]) * 10

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(2000)))

    def test_a_file_opened_before_a_deletion_is_not_kept(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.put("a", [b"old"])
        open_file = local._OpenFile

        def open_slowly(path: Path) -> local._OpenFile:
            file = open_file(path)
            monkeypatch.setattr(local, "_OpenFile", open_file)
            storage.delete("a")
            return file

        monkeypatch.setattr(local, "_OpenFile", open_slowly)
        assert storage.read("a", 0, 3) == b"old"
        storage.put("a", [b"new"])
        assert storage.read("a", 0, 3) == b"new"

    def test_a_failed_read_opens_anew_next_time(
        self, storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.put("a", [b"abc"])
        storage.read("a", 0, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", fail(errno.ESTALE))
            with pytest.raises(StorageUnavailable, match="Stale"):
                storage.read("a", 0, 1)
        assert descriptors_below(root) == 0
        assert storage.read("a", 0, 3) == b"abc"


class TestSweep:
    def test_only_stale_temporary_files_go(self, storage: LocalStorage, root: Path) -> None:
        clock = FixedClock()
        storage.put("data/a", [b"x"])
        old, young, foreign = ".a.xbfs-partial-1-" + "0" * 16, ".a.xbfs-partial-1-" + "1" * 16, "notes"
        now_s = clock.now_ns() // 10**9
        for name, age_s in ((old, 3601), (young, 3599), (foreign, 9999)):
            (root / "tmp" / name).write_bytes(b"x")
            os.utime(root / "tmp" / name, (now_s - age_s, now_s - age_s))
        (root / "data" / old).write_bytes(b"x")
        os.utime(root / "data" / old, (0, 0))
        assert storage.sweep_temporary(3600, clock) == 1
        assert sorted(leftovers(root)) == [young, foreign]
        assert (root / "data" / old).exists()
        clock.advance(10)
        assert storage.sweep_temporary(3600, clock) == 1
        assert storage.sweep_temporary(3600, clock) == 0
        assert storage.get("data/a") == b"x"

    def test_a_storage_never_written_has_nothing_to_sweep(self, storage: LocalStorage, root: Path) -> None:
        assert storage.sweep_temporary(0, FixedClock()) == 0
        assert not root.exists()
