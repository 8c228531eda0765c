"""Every bad input ends with its own class, exit code and a hint, on standard error and in the JSON document."""

from __future__ import annotations

import resource
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.cli import MIB, PASSPHRASE, World, make_world
from tests.support.runtime import SeededRandom
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.catalog.restore_point import RestorePoint, seal_manifest
from xbfs_engine.codec import wire
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.store.pack import blob_hash
from xbfs_engine.store.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Call(NamedTuple):
    """A command line and changes of the environment."""

    words: list[str | Path]
    environment: dict[str, str | None] = {}  # noqa: RUF012 - never changed


class Case(NamedTuple):
    """What a bad input must give. ``hint``: a part of it."""

    prepare: Callable[[World], Call]
    code: int
    error: str
    hint: str


CASES: list[Case] = []


def bad(code: int, error: str, hint: str) -> Callable[[Callable[[World], Call]], Callable[[World], Call]]:
    """Declares a bad input; its function gets a world of its own to spoil."""

    def declare(prepare: Callable[[World], Call]) -> Callable[[World], Call]:
        CASES.append(Case(prepare, code, error, hint))
        return prepare

    return declare


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    return template.copy(tmp_path)


def test_bad_input(case: Case, world: World) -> None:
    words, environment = case.prepare(world)
    done = world.run(*words, "--json", **environment)
    assert (done.code, done.json["error"]["class"]) == (case.code, case.error), done.err
    error = done.json["error"]
    assert error["exit_code"] == case.code
    assert case.hint in error["hint"]
    assert f"xbfs: {error['message']}\nhint: {error['hint']}\n" in done.err


def flip(path: Path, offset: int = -1) -> None:
    """Change a byte; -1 is the one in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset < 0 else offset] ^= 0x10
    path.chmod(0o600)
    path.write_bytes(data)


@bad(51, "WrongPassphrase", "recovery code")
def wrong_passphrase(_: World) -> Call:
    return Call(["points"], {"XBFS_PASSPHRASE": PASSPHRASE + "!"})


@bad(51, "WrongPassphrase", "group by group")
def mistyped_recovery_code(world: World) -> Call:
    code: str = world.init["recovery_code"]
    return Call(["points"], {"XBFS_PASSPHRASE": ("1" if code[0] == "0" else "0") + code[1:]})


@bad(56, "PassphraseMissing", "XBFS_PASSPHRASE_FILE")
def no_passphrase(_: World) -> Call:
    return Call(["points"], {"XBFS_PASSPHRASE": None})


@bad(56, "PassphraseMissing", "check the file")
def unreadable_passphrase_file(world: World) -> Call:
    return Call(["points"], {"XBFS_PASSPHRASE": None, "XBFS_PASSPHRASE_FILE": str(world.directory / "nowhere")})


@bad(2, "UsageError", "XBFS_REPOSITORY")
def no_repository_given(_: World) -> Call:
    return Call(["points"], {"XBFS_REPOSITORY": None})


@bad(11, "NotARepository", "xbfs init")
def not_a_repository(world: World) -> Call:
    return Call(["-r", world.directory / "nowhere", "points"], {"XBFS_PASSPHRASE": None})


@bad(12, "RepositoryExists", "empty directory")
def init_twice(_: World) -> Call:
    return Call(["init"])


@bad(13, "FormatTooNew", "upgrade")
def newer_format(world: World) -> Call:
    blob = wire.encode({"version": 2, "body": b"", "signature": bytes(64)})
    (world.repository / "config" / "00000002").write_bytes(blob)
    return Call(["points"])


@bad(14, "ConfigDamaged", "from a copy")
def damaged_config(world: World) -> Call:
    flip(world.repository / "config" / "00000001")
    return Call(["points"])


@bad(43, "BitmapInvalid", "as XAPI returns it")
def bitmap_of_wrong_length(world: World) -> Call:
    world.bitmap.write_text("AAAA")
    return Call(["backup", "image", world.gen2, "--vm", "web", "--changed", world.bitmap])


@bad(43, "BitmapInvalid", "as XAPI returns it")
def extents_beyond_the_disk(world: World) -> Call:
    world.bitmap.write_text(f"[[{5 * MIB}, 778]]")
    return Call(["backup", "image", world.gen2, "--vm", "web", "--changed", world.bitmap])


@bad(41, "SourceUnreadable", "--changed")
def bitmap_that_does_not_exist(world: World) -> Call:
    return Call(["backup", "image", world.gen2, "--vm", "web", "--changed", "nowhere"])


@bad(41, "SourceUnreadable", "path")
def source_that_does_not_exist(world: World) -> Call:
    return Call(["backup", "image", world.directory / "nowhere", "--vm", "web"])


@bad(44, "DiskShrunk", "--new-chain")
def source_that_shrank(world: World) -> Call:
    with world.gen2.open("r+b") as file:
        file.truncate(MIB)
    return Call(["backup", "image", world.gen2, "--vm", "web"])


@bad(17, "NoBasePoint", "--changed")
def delta_without_a_base(world: World) -> Call:
    return Call(["backup", "image", world.gen2, "--vm", "new", "--changed", world.bitmap])


@bad(2, "UsageError", "0=")
def delta_of_no_disk_in_particular(world: World) -> Call:
    return Call(["backup", "image", world.gen1, world.gen2, "--vm", "web", "--changed", world.bitmap])


@bad(2, "UsageError", "once for every PATH")
def fewer_numbers_than_disks(world: World) -> Call:
    return Call(["backup", "image", world.gen1, world.gen2, "--vm", "web", "--disk", "1"])


@bad(2, "UsageError", "--vm NAME")
def vm_without_a_name(world: World) -> Call:
    return Call(["backup", "image", world.gen1, "--vm", ""])


@bad(15, "PointNotFound", "xbfs points")
def unknown_point(_: World) -> Call:
    return Call(["export", "00000000"])


@bad(15, "PointNotFound", "xbfs points")
def unknown_vm(_: World) -> Call:
    return Call(["show", "nobody@latest"])


def points_of_one_prefix(world: World) -> str:
    """Add points until two ids begin with the same four digits; returns these."""
    runtime = system_runtime()
    repository = open_repository(LocalStorage(world.repository), runtime, PASSPHRASE)
    catalog = Catalog(repository)
    catalog.refresh()
    point = catalog.points()[0]
    blobs: dict[str, bytes] = {}
    while True:
        fields = {name: getattr(point, name) for name in RestorePoint.__slots__}
        blob = seal_manifest(repository.keys, runtime.random, RestorePoint(**fields))
        prefix = blob_hash(blob).hex()[:4]
        if prefix in blobs:
            for found in (blobs[prefix], blob):
                repository.storage.put(f"points/{blob_hash(found).hex()}", [found])
            return prefix
        blobs[prefix] = blob


@bad(16, "PointAmbiguous", "more characters")
def ambiguous_prefix(world: World) -> Call:
    return Call(["show", points_of_one_prefix(world)])


@bad(16, "PointAmbiguous", "uuid")
def ambiguous_vm(world: World) -> Call:
    other = "6b1bd5c2-34d1-4a8e-9e0a-3f9d3c1c7c11"
    world.good("backup", "image", world.gen1, "--vm", "web", "--vm-uuid", other)
    return Call(["backup", "image", world.gen1, "--vm", "web"])


@bad(24, "ManifestCorrupt", "xbfs verify")
def damaged_manifest(world: World) -> Call:
    flip(world.repository / "points" / world.ids[0])
    return Call(["show", world.ids[0][:8]])


@bad(21, "ChunkCorrupt", "xbfs verify")
def damaged_chunk(world: World) -> Call:
    flip(max(world.repository.glob("data/*/*"), key=lambda path: path.stat().st_size))
    return Call(["export", world.ids[0], "-o", world.directory / "out.raw"])


@bad(28, "DamageFound", "copy of the repository")
def damage_found(world: World) -> Call:
    flip(max(world.repository.glob("data/*/*"), key=lambda path: path.stat().st_size))
    return Call(["verify"])


@bad(26, "BlobLost", "xbfs verify")
def lost_pack(world: World) -> Call:
    max(world.repository.glob("data/*/*"), key=lambda path: path.stat().st_size).unlink()
    return Call(["export", world.ids[0], "-o", world.directory / "out.raw"])


@bad(37, "TargetExists", "--overwrite")
def target_exists(world: World) -> Call:
    return Call(["export", "web@latest", "-o", world.gen1])


@bad(38, "TargetUnwritable", "create the directory")
def target_without_directory(world: World) -> Call:
    return Call(["export", "web@latest", "-o", world.directory / "nowhere" / "out.raw"])


@bad(2, "UsageError", "-o FILE")
def image_and_document_on_one_stream(_: World) -> Call:
    return Call(["export", "web@latest", "-o", "-"])


@bad(2, "UsageError", "--disk: 0")
def unknown_disk(_: World) -> Call:
    return Call(["export", "web@latest", "--disk", "7"])


@bad(66, "ImageUnsupported", "raw")
def disk_too_large_for_vhd(world: World) -> Call:
    with world.gen1.open("r+b") as file:
        file.truncate(2041 << 30)
    world.good("backup", "image", world.gen1, "--vm", "huge")
    return Call(["export", "huge@latest", "--format", "vhd", "-o", world.directory / "out.vhd"])


@bad(53, "KeySlotNotFound", "key list")
def unknown_key_slot(_: World) -> Call:
    return Call(["key", "remove", "ffffffffffffffff"])


@bad(54, "LastKeySlot", "another")
def last_key_slot(world: World) -> Call:
    first, second = (slot["slot_id"] for slot in world.good("key", "list", "--json").json["slots"])
    world.good("key", "remove", second)
    return Call(["key", "remove", first])


@bad(55, "KeyNotHeld", "owner")
def reading_as_a_node(world: World) -> Call:
    assert world.run("key", "add", "--role", "node", XBFS_NEW_PASSPHRASE="node").code == 0
    return Call(["export", "web@latest", "-o", world.directory / "out.raw"], {"XBFS_PASSPHRASE": "node"})


@bad(62, "MountPointNotEmpty", "empty directory")
def mount_point_not_empty(world: World) -> Call:
    return Call(["mount", world.directory])


@bad(63, "MountPointInside", "outside the repository")
def mount_inside_the_repository(world: World) -> Call:
    (world.repository / "mnt").mkdir()
    return Call(["mount", world.repository / "mnt"])


@bad(64, "MountPointInvalid", "create the directory")
def mount_point_missing(world: World) -> Call:
    return Call(["mount", world.directory / "nowhere"])


@bad(61, "FuseMissing", "install fuse3")
def no_pyfuse3(world: World) -> Call:
    (world.directory / "pyfuse3.py").write_text("raise ImportError('libfuse3.so.3: cannot open shared object file')\n")
    (world.directory / "mnt").mkdir()
    path = f"{world.directory}:{world.environment()['PYTHONPATH']}"
    return Call(["mount", world.directory / "mnt"], {"PYTHONPATH": path})


@bad(61, "FuseMissing", "install fuse3")
def no_fusermount3(world: World) -> Call:
    (world.directory / "mnt").mkdir()
    return Call(["mount", world.directory / "mnt", "--background"], {"PATH": "/nowhere"})


@bad(65, "NotMounted", "findmnt")
def nothing_mounted(world: World) -> Call:
    return Call(["umount", world.directory])


@bad(2, "UsageError", "xbfs --help")
def unknown_verb(_: World) -> Call:
    return Call(["nonsense"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases are declared above by decorator."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=[case.prepare.__name__ for case in CASES])


def test_damage_is_reported_beside_the_error_and_one_bad_manifest_does_not_hide_the_others(world: World) -> None:
    flip(world.repository / "points" / world.ids[0])
    listed = world.run("points", "--json")
    assert listed.code == 3
    assert [point["id"] for point in listed.json["points"]] == [world.ids[1]]
    assert world.ids[0][:12] in listed.json["warnings"][0]["message"]
    checked = world.run("check", "--json")
    assert (checked.code, checked.json["error"]["class"], checked.json["healthy"]) == (28, "DamageFound", False)
    assert [hit["point"] for hit in checked.json["points_hit"]] == [world.ids[0]]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """A directory with room for 8 MiB: a small tmpfs, else one where files of 2 MiB are the limit."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        yield place, limit_file_size
        return
    try:
        yield place, None
    finally:
        subprocess.run(["umount", place], check=True)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_full_disk_loses_no_committed_point(
    way: str, world: World, full_disk: tuple[Path, Callable[[], None] | None]
) -> None:
    place, limit = full_disk if way == "tmpfs" else (world.directory, limit_file_size)
    if place != world.directory:
        shutil.copytree(world.repository, place / "repository")
    large = world.directory / "large.raw"
    large.write_bytes(SeededRandom(4).token(12 * MIB))
    here = str(place / "repository")
    failed = world.run("backup", "image", large, "--vm", "large", "--json", limit=limit, XBFS_REPOSITORY=here)
    assert (failed.code, failed.json["error"]["class"]) == (32, "StorageFull"), failed.err
    assert failed.json["error"]["hint"]
    listed = world.run("points", "--json", XBFS_REPOSITORY=here)
    assert [point["id"] for point in listed.json["points"]] == list(world.ids)
    assert world.run("export", "web@latest", "-o", "-", XBFS_REPOSITORY=here).out == world.gen2.read_bytes()
    assert not list((place / "repository" / "tmp").iterdir())


def test_an_export_onto_a_full_disk_leaves_nothing(
    world: World, full_disk: tuple[Path, Callable[[], None] | None]
) -> None:
    place, limit = full_disk
    large = world.directory / "large.raw"
    large.write_bytes(SeededRandom(4).token(12 * MIB))
    world.good("backup", "image", large, "--vm", "large")
    failed = world.run("export", "large@latest", "-o", place / "out.raw", "--json", limit=limit)
    assert (failed.code, failed.json["error"]["class"]) == (32, "StorageFull"), failed.err
    assert list(place.iterdir()) == []
