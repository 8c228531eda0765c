"""The ledger: what it remembers after a crash at any byte, who counts as alive, what stays of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.runtime import FixedClock, SeededRandom
from xbfs_engine.core.errors import StorageError
from xbfs_engine.core.runtime import Runtime
from xbfs_engine.source.xapi import ledger_record
from xbfs_engine.source.xapi.ledger import Kind, Ledgers, state_directory
from xbfs_engine.source.xapi.markers import (
    Marker,
    block_reason,
    import_name,
    marker_of,
    run_of_reason,
    slot_of,
    snapshot_name,
)

if TYPE_CHECKING:
    from xbfs_engine.source.xapi.ledger import RunLedger

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
def ledgers(tmp_path: Path, clock: FixedClock) -> Ledgers:
    return Ledgers(tmp_path / "runs", Runtime(clock, SeededRandom(1)))


def ledger_file(tmp_path: Path, ledger: RunLedger) -> Path:
    return tmp_path / "runs" / f"{ledger.run}.jsonl"


async def die(ledgers: Ledgers, tmp_path: Path, ledger: RunLedger, before: bytes) -> None:
    """As if the process had been killed when its file held ``before``."""
    ledger_file(tmp_path, ledger).write_bytes(before)


async def test_run_that_leaves_nothing_leaves_no_file(ledgers: Ledgers, tmp_path: Path) -> None:
    async with ledgers.begin("node") as ledger:
        item = await ledger.intend(Kind.SNAPSHOT, vm_uuid="vm", name="a name")
        assert ledger_file(tmp_path, ledger).exists()
        await ledger.made(item, "uuid")
        await ledger.gone(item)
    assert not ledger_file(tmp_path, ledger).exists()
    assert await ledgers.runs() == []


async def test_run_is_live_until_left_and_what_it_kept_stays(ledgers: Ledgers, tmp_path: Path) -> None:
    async with ledgers.begin("node") as ledger:
        gone = await ledger.intend(Kind.SNAPSHOT, vm_uuid="vm", name="a name")
        vdi = await ledger.intend(Kind.VDI, vm_uuid="vm", uuid="the-vdi")
        await ledger.keep(vdi, slot_of("repo", "vm", 0))
        vdi = await ledger.confirm(vdi)
        await ledger.gone(gone)
        assert [state.live for state in await ledgers.runs()] == [True]
        async with ledgers.claim("node") as claimed:
            assert claimed == {}
    (state,) = await ledgers.runs()
    assert not state.live
    assert list(state.record.items.values()) == [vdi]
    assert vdi.keep is not None
    assert vdi.keep.slot == "repo/vm/0"
    assert vdi.keep.confirmed
    assert len(ledger_file(tmp_path, ledger).read_bytes().splitlines()) == 4  # shortened


async def test_claimed_runs_are_held_and_can_be_written_to(ledgers: Ledgers, tmp_path: Path) -> None:
    async with ledgers.begin("node") as ledger:
        item = await ledger.intend(Kind.BLOCK, vm_uuid="vm")
        torn = ledger_file(tmp_path, ledger).read_bytes() + b'{"do":"made","item":1,"uu'
    await die(ledgers, tmp_path, ledger, torn)
    async with ledgers.claim("node") as claimed:
        assert list(claimed) == [ledger.run]
        assert claimed[ledger.run].items == [item]
        async with ledgers.claim("node") as second:
            assert second == {}
        await claimed[ledger.run].made(item, "uuid")
        assert ledger_record.decode(ledger.run, ledger_file(tmp_path, ledger).read_bytes()).items[1].uuid == "uuid"
        await claimed[ledger.run].gone(item)
    assert not ledger_file(tmp_path, ledger).exists()


async def test_other_nodes_and_newer_releases_are_left_alone(ledgers: Ledgers, tmp_path: Path) -> None:
    async with ledgers.begin("other") as other:
        await other.intend(Kind.BLOCK, vm_uuid="vm")
    newer = tmp_path / "runs" / ("ab" * 8 + ".jsonl")
    newer.write_bytes(b'{"do":"run","version":2,"run":"x","node":"node","started_ns":1}\n')
    before = newer.read_bytes()
    (tmp_path / "runs" / "notes.txt").write_text("not ours")
    async with ledgers.claim("node") as claimed:
        assert claimed == {}
    assert newer.read_bytes() == before
    assert len(await ledgers.runs()) == 2


async def test_a_later_base_is_newer_whatever_the_clock_says(ledgers: Ledgers, clock: FixedClock) -> None:
    times = []
    for now_ns in (2_000, 1_000, 1_000):
        clock.set(now_ns)
        async with ledgers.begin("node") as ledger:
            item = await ledger.keep(await ledger.intend(Kind.VDI, uuid="vdi"), "slot")
            assert item.keep is not None
            times.append(item.keep.kept_ns)
    assert times == sorted(set(times))


async def test_a_killed_process_no_longer_holds_its_run(tmp_path: Path) -> None:
    program = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from xbfs_engine.core.runtime import system_runtime\n"
        "from xbfs_engine.source.xapi.ledger import Kind, Ledgers\n"
        "async def main():\n"
        "    async with Ledgers(Path(sys.argv[1]), system_runtime()).begin('node') as ledger:\n"
        "        await ledger.intend(Kind.SNAPSHOT, vm_uuid='vm', name='n')\n"
        "        print(ledger.run, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    ledgers = Ledgers(tmp_path / "runs", Runtime(FixedClock(), SeededRandom(1)))
    process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here
        [sys.executable, "-c", program, str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT}"},
    )
    try:
        assert process.stdout is not None
        run = process.stdout.readline().decode().strip()
        assert [state.live for state in await ledgers.runs()] == [True]
    finally:
        process.kill()
        process.communicate()
    async with ledgers.claim("node") as claimed:
        assert [item.kind for item in claimed[run].items] == [Kind.SNAPSHOT]


async def test_failed_write_is_an_error_and_changes_nothing(
    ledgers: Ledgers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xbfs_engine.source.xapi.ledger.LEDGER_SIZE_MAX", 200)
    async with ledgers.begin("node") as ledger:
        with pytest.raises(StorageError, match="too long"):
            await ledger.intend(Kind.SNAPSHOT, vm_uuid="vm", name="x" * 200)
        assert ledger.items == []
    (tmp_path / "runs").chmod(0o700)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError):
        await Ledgers(blocked / "runs", Runtime(FixedClock(), SeededRandom(1))).runs()


def test_state_directory() -> None:
    assert state_directory({"XBFS_STATE": "/srv/state"}) == Path("/srv/state")
    assert state_directory({"XDG_STATE_HOME": "/srv"}) == Path("/srv/xbfs")
    assert state_directory({}) == Path.home() / ".local/state/xbfs"


@given(st.binary(max_size=300), st.integers(0, 2000))
def test_cut_anywhere_a_ledger_tells_a_prefix(tail: bytes, cut: int) -> None:
    """Whole lines count, whatever the last one was torn to."""
    events = [
        {"do": "run", "version": 1, "run": "r", "node": "n", "started_ns": 1},
        *({"do": "intend", "item": n, "kind": "vdi", "at": 1, "vm": "v", "about": {"a": "é"}} for n in range(1, 5)),
        ledger_record.made(2, "uuid"),
        ledger_record.gone(1),
    ]
    whole = ledger_record.encode(events)
    content = whole[:cut]
    lines = content.count(b"\n")
    record = ledger_record.decode("0" * 16, content + b"\x00" + tail.replace(b"\n", b""))
    expected = ledger_record.RunRecord("0" * 16)
    for event in events[:lines]:
        expected.apply(event)
    assert record == expected


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(allow_nan=False)
EVENTS = st.dictionaries(
    st.sampled_from(
        ["do", "item", "kind", "at", "vm", "about", "uuid", "slot", "kept_ns", "confirmed", "with_data", "node"]
    ),
    st.sampled_from(["run", "intend", "made", "keep", "gone", "vdi", 1, 2, True])
    | SCALARS
    | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3),
)


@given(st.lists(EVENTS, max_size=20), st.binary(max_size=100))
def test_garbage_never_fails_and_compacts_to_the_same(events: list[dict[str, object]], noise: bytes) -> None:
    content = b"\n".join(json.dumps(event).encode() for event in events) + b"\n" + noise
    record = ledger_record.decode("0" * 16, content)
    again = ledger_record.decode("0" * 16, ledger_record.compact(record))
    assert again.items == record.items


def test_markers_travel_through_other_config() -> None:
    marker = Marker("0123456789abcdef", "node", 7, "vdi", "vm", "2026-09-20T21:00:03Z", "self", "slot")
    assert marker_of({"XenCenter.x": "1"} | marker.to_other_config()) == marker
    assert marker.is_on("self")
    assert not marker.is_on("a copy")
    assert marker.of("").is_on("anything")
    assert marker_of({}) is None
    for key in ("xbfs:run", "xbfs:node", "xbfs:item", "xbfs:kind"):
        assert marker_of(marker.to_other_config() | {key: ""}) is None
    assert marker_of(marker.to_other_config() | {"xbfs:run": "x" * 16}) is None
    assert marker_of(marker.to_other_config() | {"xbfs:item": "٣"}) is None


@given(st.text(min_size=1, max_size=255).filter(lambda text: text == text.strip()))
def test_reasons_tell_run_and_node(node: str) -> None:
    assert run_of_reason(block_reason("0123456789abcdef", node)) == ("0123456789abcdef", node)


def test_reasons_of_others_are_not_ours() -> None:
    assert run_of_reason("VM is being backed up") is None
    assert run_of_reason("xbfs run 12 of node n is at work on this VM") is None


def test_names_hold_the_run_and_no_control_characters() -> None:
    name = snapshot_name("0123456789abcdef", 3, "we\x00b" + "x" * 500)
    assert name.startswith("xbfs 0123456789abcdef-3 we?b")
    assert len(name) < 128
    assert import_name("0123456789abcdef", 3, "web") == "[Importing xbfs 0123456789abcdef-3] web"
