"""Archives of files of a guest: what readers of such archives make of them, and what becomes of trouble."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.get_files import Listening
from tests.support.get_guest import SECOND, Node, TreeGuest, directory, file, folder, symlink
from xbfs_engine.core.errors import GuestDamaged, StorageFull, TargetExists, TargetUnwritable
from xbfs_engine.guestfs import acl
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files.records import Account
from xbfs_engine.restore.files.restoring import Options, Source, restore_files
from xbfs_engine.restore.files.tar_target import FileOutput, StreamOutput, TarTarget
from xbfs_engine.storage.files import AtomicOutput

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.restore.files.tar_target import Output

BIG = bytes(range(256)) * 4096 * 3
LONG = b"n" * 200


class Memory:
    """Bytes, which can be cut if ``cuts``."""

    def __init__(self, *, cuts: bool = True) -> None:
        self.data = bytearray()
        self.cuts = cuts
        self.finished = False

    def write(self, data: bytes | bytearray) -> None:
        self.data += data

    def rewind(self, position: int) -> bool:
        if self.cuts:
            del self.data[position:]
        return self.cuts

    def finish(self) -> None:
        self.finished = True


def archive(guest: TreeGuest, output: Output, *, with_owner: bool = True) -> tuple[Account, Listening]:
    account, listening = Account(), Listening()
    target = TarTarget(output, account, owner=(11, 12), with_owner=with_owner)
    restore_files([Source(guest, b"/")], target, Options(), listening)
    return account, listening


def members(data: bytes | bytearray) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as opened:
        return {each.name: each for each in opened.getmembers()}


def test_everything_is_told() -> None:
    shared = file(BIG, nlink=2)
    tree = directory(
        a=file(b"hello", uid=3_000_000_000, gid=7, mode=0o4755, xattrs={b"user.x": b"\0\xff\n", b"user.a=b%": b"1"}),
        d=folder({b"odd\xff\nname": file(b"y"), LONG: file(b"z"), b"twin": shared}), twin=shared,
        link=symlink(b"../\xff"), null=Node(Kind.CHARACTER_DEVICE, device=(1, 3)), fifo=Node(Kind.FIFO),
        old=file(mtime_ns=-3 * SECOND + 1), new=file(mtime_ns=10**11 * SECOND), socket=Node(Kind.SOCKET),
    )  # fmt: skip
    output = Memory()
    account, listening = archive(TreeGuest({"0": tree}), output)
    assert not listening.failures
    assert not account.losses
    assert output.finished
    assert len(output.data) % 10240 == 0
    found = members(output.data)
    assert (found["a"].uid, found["a"].gid, found["a"].mode, found["a"].size) == (3_000_000_000, 7, 0o4755, 5)
    assert found["a"].pax_headers["SCHILY.xattr.user.x"].encode(errors="surrogateescape") == b"\0\xff\n"
    assert found["a"].pax_headers["SCHILY.xattr.user.a%3Db%25"] == "1"
    assert os.fsdecode(b"d/odd\xff\nname") in found
    assert f"d/{LONG.decode()}" in found
    assert found["twin"].islnk()
    assert found["twin"].linkname == "d/twin"
    assert found["link"].linkname == os.fsdecode(b"../\xff")
    assert (found["null"].devmajor, found["null"].devminor) == (1, 3)
    assert found["fifo"].isfifo()
    assert found["new"].mtime == 10**11
    assert found["old"].pax_headers["mtime"] == "-2.999999999"
    assert "socket" not in found
    assert account.totals.sockets_skipped == 1


def test_acls_are_text_and_what_is_none_is_told() -> None:
    entries = [
        acl.AclEntry(0x01, 6, 0),
        acl.AclEntry(0x02, 5, 1234),
        acl.AclEntry(0x04, 4, 0),
        acl.AclEntry(0x10, 7, 0),
    ]
    tree = directory(
        a=file(xattrs={acl.ACCESS_NAME: acl.encode(entries)}),
        b=file(xattrs={acl.ACCESS_NAME: b"nonsense", b"user.\xff": b""}),
    )
    output = Memory()
    account, _ = archive(TreeGuest({"0": tree}), output)
    assert members(output.data)["a"].pax_headers["SCHILY.acl.access"] == "user::rw-,user:1234:r-x,group::r--,mask::rwx"
    assert [loss.count for loss in account.losses.values()] == [2]


def test_owners_may_be_left_out() -> None:
    tree = TreeGuest({"0": directory(a=file(uid=5, gid=6))})
    for with_owner, owner in ((True, (5, 6)), (False, (11, 12))):
        output = Memory()
        archive(tree, output, with_owner=with_owner)
        assert (members(output.data)["a"].uid, members(output.data)["a"].gid) == owner


@pytest.mark.parametrize("size", [100, 8192, 5 << 20])
def test_holes_stay_holes(size: int, tmp_path: Path) -> None:
    """For Python's reader and for GNU tar; holes at the start, in the midst and at the end."""
    data = b"d" * size
    gap = bytes(2 << 20)
    sparse = {
        b"midst": file(data + gap + data, holes=((size, len(gap)),)),
        b"ends": file(gap + data + gap, holes=((0, len(gap)), (len(gap) + size, len(gap)))),
        b"all": file(gap, holes=((0, len(gap)),)),
        b"\xff": file(data + gap, holes=((size, len(gap)),)),
    }
    output = Memory()
    archive(TreeGuest({"0": directory(d=folder(sparse), top=sparse[b"midst"])}), output)
    if size % 512 == 0:
        assert len(output.data) < 6 * size + (64 << 10)
    with tarfile.open(fileobj=io.BytesIO(output.data), errors="surrogateescape") as opened:
        for name, node in sparse.items():
            taken = opened.extractfile("d/" + os.fsdecode(name))
            assert taken is not None
            assert taken.read() == node.content
    (tmp_path / "x.tar").write_bytes(output.data)
    subprocess.run(["tar", "-xf", tmp_path / "x.tar", "-C", tmp_path], check=True, capture_output=True)
    for name, node in sparse.items():
        with open(bytes(tmp_path / "d") + b"/" + name, "rb") as restored:  # noqa: PTH123 - a name that is no text
            assert restored.read() == node.content
    assert (tmp_path / "d/all").stat().st_blocks == 0
    assert (tmp_path / "d/midst").stat().st_blocks * 512 < 2 * size + (64 << 10) or size % 512
    assert (tmp_path / "top").read_bytes() == sparse[b"midst"].content


def _troubled() -> TreeGuest:
    damaged = file(BIG, read_error=(2 << 20, GuestDamaged("block 7")))
    return TreeGuest({"0": directory(a=file(b"a"), d=directory(damaged=damaged), small=file(b"s"), z=file(BIG))})


def test_a_file_takes_back_what_can_not_be_read() -> None:
    output = Memory()
    _, listening = archive(_troubled(), output)
    assert listening.failed_paths == [b"/d/damaged"]
    assert members(output.data).keys() == {"a", "d", "small", "z"}


def test_a_stream_ends_where_it_can_not_go_on() -> None:
    output = Memory(cuts=False)
    with pytest.raises(TargetUnwritable, match="ends within 'd/damaged'"):
        archive(_troubled(), output)
    assert not output.finished
    done = subprocess.run(["tar", "-tf", "-"], input=bytes(output.data), check=False, capture_output=True)
    assert done.returncode != 0, "whoever reads it must know"


def test_small_files_are_known_to_be_readable_before_they_begin() -> None:
    output = Memory(cuts=False)
    damaged = file(b"x" * 1000, read_error=(0, GuestDamaged("block 7")))
    _, listening = archive(TreeGuest({"0": directory(a=damaged, b=file(b"b"))}), output)
    assert listening.failed_paths == [b"/a"]
    assert members(output.data).keys() == {"b"}


def test_files_appear_when_they_are_complete(tmp_path: Path) -> None:
    place = tmp_path / "x.tar"
    with pytest.raises(GuestDamaged), AtomicOutput(place, overwrite=False) as output:
        archive(TreeGuest({"0": Node(Kind.DIRECTORY, list_error=GuestDamaged("leaf"))}), FileOutput(output))
    assert not list(tmp_path.iterdir())
    with AtomicOutput(place, overwrite=False) as output:
        archive(_troubled(), FileOutput(output))
    assert members(place.read_bytes()).keys() == {"a", "d", "small", "z"}
    with pytest.raises(TargetExists), AtomicOutput(place, overwrite=False):
        pass


def test_a_reader_that_leaves_ends_it() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        with pytest.raises(TargetUnwritable, match="has gone"):
            archive(TreeGuest({"0": directory(a=file(BIG), b=file(BIG))}), StreamOutput(theirs))
    finally:
        os.close(theirs)


def test_a_full_place_is_told() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StorageFull):
            archive(TreeGuest({"0": directory(a=file(BIG))}), StreamOutput(full))
    finally:
        os.close(full)


def test_a_pipe_gets_the_same_bytes() -> None:
    output = Memory()
    archive(TreeGuest({"0": directory(a=file(BIG), b=file(b"b"))}), output)
    ours, theirs = os.pipe()
    found: list[bytes] = []

    def read() -> None:
        with open(ours, "rb") as pipe:  # noqa: PTH123 - a descriptor
            found.append(pipe.read())

    reader = threading.Thread(target=read)
    reader.start()
    archive(TreeGuest({"0": directory(a=file(BIG), b=file(b"b"))}), StreamOutput(theirs))
    os.close(theirs)
    reader.join(20)
    assert found == [bytes(output.data)]
