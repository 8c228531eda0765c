"""Owners, modes, times, attributes and ACLs of restored files; what can not be held is told and widens no rights."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support.get_files import IS_ROOT, get, names
from tests.support.get_guest import SECOND, Node, TreeGuest, directory, file, symlink
from xbfs_engine.guestfs import acl
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files.restoring import Options

if TYPE_CHECKING:
    from pathlib import Path

needs_root = pytest.mark.skipif(not IS_ROOT, reason="owners and devices need root")
ACL = acl.encode(
    [
        acl.AclEntry(0x01, 6, 0), acl.AclEntry(0x02, 6, 1234), acl.AclEntry(0x04, 4, 0), acl.AclEntry(0x10, 6, 0),
        acl.AclEntry(0x20, 0, 0),
    ]
)  # fmt: skip
"""The file's mode shows the mask, rw-, for the group, which has only r--."""
CAPABILITY = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)


def guest(**children: Node) -> TreeGuest:
    return TreeGuest({"0": directory(**children)})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def has_acls(path: Path) -> bool:
    try:
        os.setxattr(path, acl.ACCESS_NAME, ACL)
    except OSError:
        return False
    os.removexattr(path, acl.ACCESS_NAME)
    return True


def test_modes_and_times(tmp_path: Path) -> None:
    times = (-5 * SECOND + 7, 0, 1, 1_600_000_000_123_456_789, (1 << 31) * SECOND + 3, 4_000_000_000 * SECOND)
    children = {f"t{number}": file(mtime_ns=time) for number, time in enumerate(times)}
    children |= {"d": Node(Kind.DIRECTORY, mode=0o1751, mtime_ns=99, children={b"in": file(mode=0o400)})}
    children |= {"l": symlink(b"x")}
    account, _ = get(guest(**children), ["/"], tmp_path, with_owner=False)
    for number, time in enumerate(times):
        found = (tmp_path / f"t{number}").stat().st_mtime_ns
        assert found == time or "times outside of what the target holds" in account.losses
    assert (tmp_path / "d").stat().st_mtime_ns == 99, "after what is in it"
    assert (mode(tmp_path / "d"), mode(tmp_path / "d/in")) == (0o1751, 0o400)
    assert (tmp_path / "l").lstat().st_mtime_ns == 1_600_000_000 * SECOND
    assert os.readlink(tmp_path / "l") == "x"  # noqa: PTH115 - the target alone


def test_times_that_no_clock_has_are_told(tmp_path: Path) -> None:
    account, listening = get(guest(a=file(b"1", mtime_ns=1 << 100), b=file()), ["/"], tmp_path)
    assert not listening.failures
    assert names(tmp_path) == {"a", "b"}
    assert sum(loss.count for loss in account.losses.values()) == 1


@needs_root
def test_owners_and_suid(tmp_path: Path) -> None:
    tree = guest(
        a=file(uid=4_000_000_000, gid=7, mode=0o6755), d=Node(Kind.DIRECTORY, uid=5, gid=6, mode=0o2770),
        l=Node(Kind.SYMLINK, target=b"/etc", uid=8, gid=9),
    )  # fmt: skip
    get(tree, ["/"], tmp_path / "kept", with_owner=True)
    found = {name: (tmp_path / "kept" / name).lstat() for name in "adl"}
    assert {(each.st_uid, each.st_gid) for each in found.values()} == {(4_000_000_000, 7), (5, 6), (8, 9)}
    assert (mode(tmp_path / "kept/a"), mode(tmp_path / "kept/d")) == (0o6755, 0o2770)
    account, _ = get(tree, ["/"], tmp_path / "left", with_owner=False)
    assert {(tmp_path / "left" / name).lstat().st_uid for name in "adl"} == {os.geteuid()}
    assert (mode(tmp_path / "left/a"), mode(tmp_path / "left/d")) == (0o755, 0o770)
    assert account.losses["suid and sgid, which go with the owner"].count == 2


@needs_root
def test_an_owner_that_can_not_be_set_takes_suid_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    account, listening = get(guest(a=file(mode=0o4755, xattrs={b"security.capability": CAPABILITY})), ["/"], tmp_path)
    assert not listening.failures
    assert mode(tmp_path / "a") == 0o755
    assert not os.listxattr(tmp_path / "a")
    assert account.losses.keys() == {
        "owners: Operation not permitted", "suid and sgid, which go with the owner",
        "capabilities, which go with the owner",
    }  # fmt: skip


@needs_root
def test_devices_and_fifos(tmp_path: Path) -> None:
    tree = guest(
        fifo=Node(Kind.FIFO, mode=0o620), null=Node(Kind.CHARACTER_DEVICE, device=(1, 3), mode=0o666),
        disk=Node(Kind.BLOCK_DEVICE, device=(259, 70_000)), odd=Node(Kind.BLOCK_DEVICE, device=(1 << 20, 1)),
        socket=Node(Kind.SOCKET), linked=Node(Kind.FIFO, nlink=1),
    )  # fmt: skip
    account, listening = get(tree, ["/"], tmp_path)
    assert not listening.failures
    assert names(tmp_path) == {"fifo", "null", "disk", "linked"}
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert mode(tmp_path / "fifo") == 0o620
    found = (tmp_path / "null").stat()
    assert (found.st_rdev, mode(tmp_path / "null")) == (os.makedev(1, 3), 0o666)
    assert (tmp_path / "disk").stat().st_rdev == os.makedev(259, 70_000)
    assert (account.totals.specials, account.totals.sockets_skipped) == (4, 1)
    assert [loss.path for loss in account.losses.values()] == [b"/odd"]


@needs_root
def test_attributes_and_capabilities(tmp_path: Path) -> None:
    xattrs = {b"user.a": b"1", b"user.empty": b"", b"trusted.t": b"\0x", b"security.capability": CAPABILITY}
    account, _ = get(guest(a=file(b"1", xattrs=xattrs, mode=0o400)), ["/"], tmp_path / "out")
    if any("user.*" in what for what in account.losses):
        pytest.skip("the temporary directory has no attributes")
    assert {os.fsencode(name): os.getxattr(tmp_path / "out/a", name) for name in os.listxattr(tmp_path / "out/a")} == (
        xattrs
    )
    get(guest(a=file(b"1", xattrs=xattrs)), ["/"], tmp_path / "none", options=Options(with_xattrs=False))
    assert not os.listxattr(tmp_path / "none/a")


def test_attributes_that_can_not_be_set_are_told_by_kind(tmp_path: Path) -> None:
    xattrs = {b"no-namespace": b"1", b"system.unheard": b"2", b"user." + b"n" * 300: b"3"}
    account, listening = get(guest(a=file(b"1", xattrs=xattrs), b=file(xattrs=xattrs)), ["/"], tmp_path)
    assert not listening.failures
    assert sorted(loss.count for loss in account.losses.values()) == [2, 2, 2]
    assert {loss.path for loss in account.losses.values()} == {b"/a"}


def test_acls_are_set_or_narrow_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe").touch()
    tree = guest(
        a=file(b"1", mode=0o660, xattrs={acl.ACCESS_NAME: ACL}),
        bad=file(b"1", mode=0o660, xattrs={acl.ACCESS_NAME: b"no ACL"}),
    )
    if has_acls(tmp_path / "probe"):
        get(tree, ["/a"], tmp_path / "kept")
        assert os.getxattr(tmp_path / "kept/a", acl.ACCESS_NAME) == ACL
        assert mode(tmp_path / "kept/a") == 0o660

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    account, _ = get(tree, ["/"], tmp_path / "lost")
    assert mode(tmp_path / "lost/a") == 0o640, "the owning group never had more"
    assert mode(tmp_path / "lost/bad") == 0o600
    assert account.losses["POSIX ACLs: Operation not supported"].count == 2


def test_acls_of_the_target_do_not_reach_what_is_restored(tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    if not has_acls(tmp_path / "probe"):
        pytest.skip("the temporary directory has no ACLs")
    out = tmp_path / "out"
    out.mkdir()
    os.setxattr(out, acl.DEFAULT_NAME, ACL)
    tree = guest(a=file(b"1"), d=directory(b=file(b"2"), e=directory(c=file())), fifo=Node(Kind.FIFO))
    get(tree, ["/"], out)
    for name in names(out):
        assert not [each for each in os.listxattr(out / name) if "acl" in each], name
        assert mode(out / name) in (0o644, 0o755)


def test_files_without_owners_get_the_umask(tmp_path: Path) -> None:
    tree = TreeGuest(
        {"0": directory(a=file(uid=0, mode=0o755), readonly=file(mode=0o555), d=directory())}, kinds={"0": "ntfs"}
    )
    get(tree, ["/"], tmp_path, volume="0", options=Options(umask=0o027))
    assert {name: mode(tmp_path / name) for name in ("a", "readonly", "d")} == {
        "a": 0o640,
        "readonly": 0o440,
        "d": 0o750,
    }
    assert {(tmp_path / name).stat().st_uid for name in ("a", "d")} == {os.geteuid()}
