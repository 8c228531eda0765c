"""Durable writes: their order on the way to the disk, their races, and the outputs written piece by piece."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xbfs_engine.core.errors import (
    BlobExists,
    BlobNotFound,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageUnavailable,
    TargetExists,
    TargetUnwritable,
)
from xbfs_engine.storage.files import (
    AtomicOutput,
    is_temporary,
    make_directories,
    storage_error,
    write_new,
    write_replace,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def fail(number: int) -> Callable[..., None]:
    def raise_error(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_error


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def record_order(patch: pytest.MonkeyPatch) -> list[str]:
    """Log the calls that decide over durability, with the last part of what they name."""
    log: list[str] = []
    fsync, link, replace, mkdir = os.fsync, os.link, os.replace, os.mkdir  # noqa: TID251 - to wrap them

    def last(path: object) -> str:
        name = Path(str(path)).name
        return "temporary" if is_temporary(name) else name

    def log_fsync(fd: int) -> None:
        log.append(f"fsync {last(Path(f'/proc/self/fd/{fd}').readlink())}")
        fsync(fd)

    def log_link(source: Path, target: Path) -> None:
        log.append(f"link {last(source)} {last(target)}")
        link(source, target)

    def log_replace(source: Path, target: Path) -> None:
        log.append(f"replace {last(source)} {last(target)}")
        replace(source, target)

    def log_mkdir(path: Path, mode: int = 0o777) -> None:
        log.append(f"mkdir {last(path)}")
        mkdir(path, mode)

    patch.setattr(os, "fsync", log_fsync)
    patch.setattr(os, "link", log_link)
    patch.setattr(os, "replace", log_replace)
    patch.setattr(os, "mkdir", log_mkdir)
    return log


class TestOrder:
    def test_a_new_file_is_on_the_disk_before_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "d").mkdir()
        log = record_order(monkeypatch)
        write_new(tmp_path / "d/a", [b"x"])
        assert log == ["fsync temporary", "link temporary a", "fsync d"]

    def test_a_replacement_is_on_the_disk_before_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "d").mkdir()
        log = record_order(monkeypatch)
        write_replace(tmp_path / "d/a", [b"x"])
        assert log == ["fsync temporary", "replace temporary a", "fsync d"]

    def test_new_directories_are_on_the_disk_before_what_is_in_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "d").mkdir()
        log = record_order(monkeypatch)
        make_directories(tmp_path / "d/e/f")
        assert log == ["mkdir e", "fsync d", "mkdir f", "fsync e"]

    def test_whoever_is_told_that_a_file_exists_may_rely_on_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d/a").write_bytes(b"first")
        log = record_order(monkeypatch)
        with pytest.raises(BlobExists):
            write_new(tmp_path / "d/a", [b"second"])
        assert log == ["fsync temporary", "link temporary a", "fsync d"]


class TestWriteNew:
    def test_a_lost_race_leaves_the_winner(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"first")
        with pytest.raises(BlobExists):
            write_new(tmp_path / "a", [b"second"])
        assert (tmp_path / "a").read_bytes() == b"first"
        assert names(tmp_path) == ["a"]

    def test_a_dangling_symlink_is_not_written_through(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BlobExists):
            write_new(tmp_path / "a", [b"x"])
        assert names(tmp_path) == ["a"]

    def test_without_hard_links_an_exclusive_rename_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", fail(errno.EPERM))
        write_new(tmp_path / "a", [b"first"])
        with pytest.raises(BlobExists):
            write_new(tmp_path / "a", [b"second"])
        assert (tmp_path / "a").read_bytes() == b"first"
        assert names(tmp_path) == ["a"]

    def test_without_either_nothing_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Libc:
            def renameat2(self, *_: object) -> int:
                ctypes.set_errno(errno.EINVAL)
                return -1

        monkeypatch.setattr(os, "link", fail(errno.EPERM))
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
        with pytest.raises(StorageError, match="neither hard links nor"):
            write_new(tmp_path / "a", [b"x"])
        assert names(tmp_path) == []

    def test_a_link_whose_reply_was_lost_has_succeeded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        link = os.link

        def link_twice(source: Path, target: Path) -> None:
            link(source, target)
            link(source, target)

        monkeypatch.setattr(os, "link", link_twice)
        write_new(tmp_path / "a", [b"x"])
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("call", ["writev", "fsync", "link"])
    def test_a_failure_before_the_name_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        monkeypatch.setattr(os, call, fail(errno.EDQUOT))
        with pytest.raises(StorageFull):
            write_new(tmp_path / "a", [b"x"])
        assert names(tmp_path) == []

    def test_after_a_failed_fsync_of_the_directory_a_second_try_finds_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fsync = os.fsync

        def fsync_files_only(fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(errno.EIO, "Input/output error")
            fsync(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync_files_only)
            for _ in range(2):
                with pytest.raises(StorageUnavailable):
                    write_new(tmp_path / "a", [b"x"])
        with pytest.raises(BlobExists):
            write_new(tmp_path / "a", [b"x"])
        assert (tmp_path / "a").read_bytes() == b"x"
        assert names(tmp_path) == ["a"]

    def test_short_writes_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writev = os.writev
        monkeypatch.setattr(os, "writev", lambda fd, views: writev(fd, [views[0][:3]]))
        parts = [b"a", b"bcdefgh", b"", b"ij", b"klmnopqrstuvwxyz"]
        write_new(tmp_path / "a", parts)
        assert (tmp_path / "a").read_bytes() == b"".join(parts)


def test_a_replacement_is_complete_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    done: list[bool] = []
    write_replace(path, [b"0" * 5000])

    def watch() -> None:
        while not done:
            data = path.read_bytes()
            assert data == data[:1] * 5000

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            for number in range(30):
                write_replace(path, [str(number % 10).encode() * 4000, str(number % 10).encode() * 1000])
        finally:
            done.append(True)
        watcher.result()
    assert names(tmp_path) == ["a"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *[(number, StorageFull) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        *[(number, StorageDenied) for number in (errno.EACCES, errno.EPERM, errno.EROFS)],
        *[(number, BlobNotFound) for number in (errno.ENOENT, errno.ENOTDIR)],
        *[(number, StorageUnavailable) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)],
        (errno.EEXIST, BlobExists),
        (errno.EXDEV, StorageError),
        (None, StorageError),
    ],
)
def test_errors_are_typed_and_say_what_and_why(number: int | None, kind: type[StorageError]) -> None:
    text = os.strerror(number) if number else "odd"
    error = storage_error(OSError(number, text) if number else OSError("odd"), "read /x")
    assert type(error) is kind
    assert error.message == f"read /x: {text}"
    assert ("ulimit" in error.hint) == (number == errno.EFBIG)


@pytest.mark.parametrize("name", ["a", "x" * 255, "ä" * 127, "\U0001f600" * 63, "new\nline"])
def test_temporary_names_are_recognisable_and_fit(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "unlink", lambda _path: None)
    write_new(tmp_path / name, [b"x"])
    [temporary] = set(names(tmp_path)) - {name}
    assert is_temporary(temporary)
    assert not is_temporary(name)


@pytest.mark.parametrize("name", [".xbfs-partial-1-0123456789abcdef", "a.xbfs-partial-1-0123456789abcdef", ".a.swp"])
def test_other_names_are_not_temporary(name: str) -> None:
    assert not is_temporary(name)


class TestAtomicOutput:
    def test_nothing_is_visible_before_the_commit(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        with AtomicOutput(path, overwrite=False) as out:
            out.write_at(1 << 20, b"end")
            out.write_at(0, memoryview(b"begin"))
            os.pwrite(out.fd, b"!", 5)
            out.set_size(2 << 20)
            [temporary] = names(tmp_path)
            assert is_temporary(temporary)
            out.commit()
        assert names(tmp_path) == ["disk.raw"]
        assert path.read_bytes() == (b"begin!".ljust(1 << 20, b"\0") + b"end").ljust(2 << 20, b"\0")
        assert path.stat().st_blocks * 512 < 1 << 20, "ranges not written are holes"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_many_threads_may_write(self, tmp_path: Path) -> None:
        with AtomicOutput(tmp_path / "a", overwrite=False) as out, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: out.write_at(number * 1000, bytes([number]) * 1000), range(100)))
            out.commit()
        assert (tmp_path / "a").read_bytes() == b"".join(bytes([number]) * 1000 for number in range(100))

    @pytest.mark.parametrize("error", [None, StorageFull("x"), KeyboardInterrupt()])
    def test_left_without_commit_it_leaves_nothing(self, tmp_path: Path, error: BaseException | None) -> None:
        def use() -> None:
            with AtomicOutput(tmp_path / "a", overwrite=True) as out:
                out.write_at(0, b"new")
                if error is not None:
                    raise error

        (tmp_path / "a").write_bytes(b"old")
        if error is None:
            use()
        else:
            with pytest.raises(type(error)):
                use()
        assert names(tmp_path) == ["a"]
        assert (tmp_path / "a").read_bytes() == b"old"

    def test_an_existing_file_is_replaced_only_on_demand(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"old")
        with pytest.raises(TargetExists, match=str(tmp_path / "a")), AtomicOutput(tmp_path / "a", overwrite=False):
            pytest.fail("entered")
        with AtomicOutput(tmp_path / "a", overwrite=True) as out:
            out.write_at(0, b"new")
            assert (tmp_path / "a").read_bytes() == b"old"
            out.commit()
        assert (tmp_path / "a").read_bytes() == b"new"
        assert names(tmp_path) == ["a"]

    def test_a_file_that_appears_meanwhile_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        link = os.link

        def link_too_late(source: Path, target: Path) -> None:
            (tmp_path / "a").write_bytes(b"other")
            link(source, target)

        def use() -> None:
            with AtomicOutput(tmp_path / "a", overwrite=False) as out:
                out.write_at(0, b"ours")
                out.commit()

        monkeypatch.setattr(os, "link", link_too_late)
        with pytest.raises(TargetExists):
            use()
        assert (tmp_path / "a").read_bytes() == b"other"
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("exists", [False, True])
    def test_a_symlink_is_followed(self, tmp_path: Path, exists: bool) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "link").symlink_to("d/real")
        if exists:
            (tmp_path / "d/real").write_bytes(b"old")
        with AtomicOutput(tmp_path / "link", overwrite=exists) as out:
            out.write_at(0, b"new")
            out.commit()
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "d/real").read_bytes() == b"new"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_devices_and_directories_are_never_replaced(self, tmp_path: Path, overwrite: bool) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (Path("/dev/null"), tmp_path, tmp_path / "fifo", Path("/")):
            with pytest.raises(TargetUnwritable, match="not a regular file"), AtomicOutput(path, overwrite=overwrite):
                pytest.fail("entered")
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    @pytest.mark.parametrize("path", ["no/such/a", "file/a", "/sys/xbfs", "x" * 256])
    def test_a_place_that_can_not_be_written_says_why(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").write_bytes(b"x")
        with pytest.raises(TargetUnwritable) as caught, AtomicOutput(tmp_path / path, overwrite=False) as out:
            out.commit()
        assert caught.value.hint
        assert names(tmp_path) == ["file"]
