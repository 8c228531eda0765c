"""Our NBD client against other people's servers: nbdkit and qemu-nbd, plain and with TLS."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine import Engine, pattern
from tests.support.nbd_certificates import HOST_NAME, Identity, identity, issued
from tests.support.nbd_reading import opened, read_reads, steps
from tests.support.nbd_servers import nbdkit, needs_nbdkit, needs_qemu_nbd, qemu_nbd, target
from xbfs_engine.core.errors import CertificateRejected, TransferFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.source.base import Extent
    from xbfs_engine.source.nbd import NbdTarget

CBT = 64 << 10
MIB = 1 << 20
SIZE = 23 * MIB + 512


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nbd") / "disk.raw"
    path.write_bytes(pattern(1, SIZE))
    return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return identity(HOST_NAME).write(tmp_path_factory.mktemp("pki"))


async def check(*targets: NbdTarget, connections: int = 3, step: int = 4 * MIB) -> None:
    async with opened(SIZE, *targets, connections=connections) as source:
        found = await read_reads(source, steps(SIZE, step))
    assert b"".join(found[read] for read in sorted(found)) == pattern(1, SIZE)


@needs_nbdkit
@pytest.mark.parametrize("tls", [False, True])
async def test_nbdkit(disk: Path, certificates: Path, *, tls: bool) -> None:
    with nbdkit("file", str(disk), certificates=certificates if tls else None) as port:
        await check(target(port, identity(HOST_NAME) if tls else None))
        await check(target(port, identity(HOST_NAME) if tls else None), connections=1, step=64 << 10)


@needs_qemu_nbd
@pytest.mark.parametrize("tls", [False, True])
async def test_qemu_nbd(disk: Path, tmp_path: Path, *, tls: bool) -> None:
    """QEMU insists on an authority: so this is also the certificate that descends from the one that is trusted."""
    name = "/uuid?session_id=OpaqueRef:secret"
    signed = issued(HOST_NAME)
    with qemu_nbd(disk, certificates=signed.write(tmp_path / "pki") if tls else None, name=name) as port:
        await check(target(port, signed if tls else None, name=name))


@needs_nbdkit
async def test_answers_in_another_order(disk: Path) -> None:
    """Requests of one connection are answered by several threads, the first ones late."""
    with nbdkit("-t", "8", "--filter=delay", "file", str(disk), "rdelay=5ms") as port:
        await check(target(port), connections=1, step=64 << 10)


@needs_nbdkit
async def test_tls_is_not_given_up(disk: Path) -> None:
    with nbdkit("--tls=off", "file", str(disk)) as port, pytest.raises(TransferFailed, match="refuses TLS"):
        async with opened(SIZE, target(port, identity(HOST_NAME))):
            pass


@needs_nbdkit
async def test_a_server_that_wants_tls_gets_no_name_in_plain(disk: Path, certificates: Path) -> None:
    with nbdkit("file", str(disk), certificates=certificates) as port:
        with pytest.raises(TransferFailed) as caught:
            async with opened(SIZE, target(port, name="session_id=secret")):
                pass
        assert "secret" not in str(caught.value) + caught.value.hint


@needs_nbdkit
@pytest.mark.parametrize(
    ("trusted", "subject"),
    [
        pytest.param(identity(HOST_NAME, serial=2), HOST_NAME, id="another key"),
        pytest.param(identity(HOST_NAME), "host2.lab", id="another name"),
        pytest.param(identity(HOST_NAME), "*.lab", id="a wildcard it does not have"),
    ],
)
async def test_the_wrong_server_is_refused(disk: Path, certificates: Path, trusted: Identity, subject: str) -> None:
    with (
        nbdkit("file", str(disk), certificates=certificates) as port,
        pytest.raises(CertificateRejected),
        trio.fail_after(5),
    ):
        await check(target(port, trusted, subject=subject))


@needs_nbdkit
@pytest.mark.parametrize("days", [-1, 3650])
async def test_expired(disk: Path, tmp_path: Path, days: int) -> None:
    server = identity(HOST_NAME, days=days)
    with nbdkit("file", str(disk), certificates=server.write(tmp_path)) as port:
        if days > 0:
            await check(target(port, server))
            return
        with pytest.raises(CertificateRejected, match="expired"):
            await check(target(port, server))


@needs_nbdkit
@pytest.mark.parametrize(
    ("names", "common_name", "subject"),
    [(("*.lab",), None, "*.LAB"), ((), "host1.lab", "host1.lab"), (("*.example.lab",), None, "a.example.lab")],
)
async def test_names_as_hosts_have_them(
    disk: Path, tmp_path: Path, names: tuple[str, ...], common_name: str | None, subject: str
) -> None:
    server = identity(*names, common_name=common_name)
    with nbdkit("file", str(disk), certificates=server.write(tmp_path)) as port:
        await check(target(port, server, subject=subject))


@needs_nbdkit
@pytest.mark.parametrize("fault", [["--filter=error", "error-pread-rate=5%"], ["--filter=exitlast"]])
async def test_errors_now_and_then(disk: Path, fault: list[str]) -> None:
    filters = [word for word in fault if word.startswith("--")]
    options = [word for word in fault if not word.startswith("--")]
    # One thread: like a host it answers in order, so something arrives before most errors.
    with nbdkit("-t", "1", *filters, "file", str(disk), *options) as port:
        await check(target(port), step=256 << 10)


@needs_nbdkit
async def test_errors_for_ever(disk: Path) -> None:
    with nbdkit("--filter=error", "file", str(disk), "error-pread=EIO", "error-pread-rate=100%") as port:
        source = target(port)
        with pytest.raises(TransferFailed, match=r"can not read offset \d+: EIO"):
            await check(source)


@needs_nbdkit
async def test_a_server_that_takes_few_clients(disk: Path) -> None:
    with nbdkit("--filter=limit", "file", str(disk), "limit=2") as port:
        await check(target(port), connections=5)


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[Extent]]:
    size = draw(st.one_of(st.integers(1, 4000), st.integers(1, 9 * MIB)))
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=24)))
    reads = [(low, high - low) for low, high in pairwise(cuts) if draw(st.booleans())]
    return size, reads


@pytest.fixture(scope="module")
def folder() -> Iterator[tuple[Path, int]]:
    with TemporaryDirectory() as name, nbdkit("file", f"dir={name}") as port:
        yield Path(name), port


@needs_nbdkit
@settings(max_examples=60, deadline=None)
@given(plan=disks(), seed=st.integers(0, 1000), threads=st.integers(1, 3), announce=st.booleans())
def test_any_reads_of_any_disk(
    folder: tuple[Path, int], plan: tuple[int, list[Extent]], seed: int, threads: int, *, announce: bool
) -> None:
    size, reads = plan
    content = pattern(seed, size)
    (folder[0] / "disk").write_bytes(content)

    async def run() -> dict[Extent, bytes]:
        async with opened(size, target(folder[1], name="disk"), read_ahead_bytes=5 * MIB) as source:
            return await read_reads(source, reads, threads=threads, announce=announce)

    found = trio.run(run)
    assert found == {(offset, length): content[offset : offset + length] for offset, length in reads}


@needs_nbdkit
@pytest.mark.parametrize("tls", [False, True])
async def test_backups_read_over_nbd(disk: Path, certificates: Path, tmp_path: Path, *, tls: bool) -> None:
    """The whole write path: a full backup, then a delta of changed blocks."""
    engine = Engine.fresh(tmp_path / "cache")
    with nbdkit("file", str(disk), certificates=certificates if tls else None) as port:
        place = target(port, identity(HOST_NAME) if tls else None)
        async with opened(SIZE, place) as source:
            first = await engine.run({0: (source, None)}).run()
        assert engine.read(first.disks[0]) == pattern(1, SIZE)
        async with opened(SIZE, place) as source:
            later = await engine.run({0: (source, [(0, CBT), (5 * MIB, 3 * CBT), (SIZE - 512, 512)])}).run()
    assert engine.read(later.disks[0]) == pattern(1, SIZE)
    assert later.disks[0].statistics.source_bytes == 4 * CBT + 512


@needs_nbdkit
async def test_a_backup_that_breaks_leaves_no_point(disk: Path, tmp_path: Path) -> None:
    engine = Engine.fresh(tmp_path / "cache")
    with nbdkit("--filter=error", "file", str(disk), "error-pread=EIO", "error-pread-rate=100%") as port:
        place = target(port)
        with pytest.raises(TransferFailed), trio.fail_after(20):
            async with opened(SIZE, place, connections=1) as source:
                await engine.run({0: (source, None)}).run()
    assert engine.points() == []
