"""What follows ``boot``: a restore point, or a verb; and who an export listens for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.points import point
from xbfs.cli.boot import plan_of
from xbfs.cli.boot_parsers import named
from xbfs.cli.main import main
from xbfs.cli.parsers import parse
from xbfs.instant.share import _address, address_towards, checked_clients
from xbfs_engine.core.errors import UsageError
from xbfs_engine.core.runtime import system_runtime

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("boot web@latest", "boot_pool:begin"),
        ("-r /r boot web@latest", "boot_pool:begin"),
        ("boot --disk 0 web@latest", "boot_pool:begin"),
        ("boot -r /r --json web@latest", "boot_pool:begin"),
        ("boot start list", "boot_pool:begin"),
        ("boot list", "boot_list:list_sessions"),
        ("boot --json list", None),
        ("--json boot list", "boot_list:list_sessions"),
        ("boot list -r /r", "boot_list:list_sessions"),
        ("boot discard web-1 --force", "boot_discard:discard"),
        ("boot serve", "boot_serve:serve"),
        ("points boot", "points:points"),
    ],
)
def test_verbs_win_over_points(line: str, call: str | None) -> None:
    if call is None:
        with pytest.raises(UsageError):
            parse(line.split())
    else:
        assert parse(line.split()).call == call


def test_other_command_lines_are_left_alone() -> None:
    for line in ("", "boot --help", "-r", "export boot --disk 0", "boot commit x"):
        assert named(line.split()) == line.split()


@pytest.mark.parametrize(
    "line", ["boot", "boot w@latest --export ftp", "boot w@latest --hydrate 1X", "boot w@latest --disk 999999"]
)
def test_mistakes_are_usage_errors(line: str) -> None:
    with pytest.raises(UsageError):
        parse(line.split())


def test_rates() -> None:
    assert parse(["boot", "w@latest"]).hydrate is None
    assert parse(["boot", "w@latest", "--hydrate"]).hydrate == 0
    assert parse(["boot", "w@latest", "--hydrate", "50M"]).hydrate == 50 << 20


def test_exports_listen_no_further_than_their_clients_are() -> None:
    assert _address(("127.0.0.1/32",)) == "127.0.0.1"
    assert _address(("127.0.0.1/32", "::1/128")) == "::1"
    assert _address(("10.0.0.0/8", "127.0.0.1/32")) == "0.0.0.0"
    assert _address(("fd00::/8",)) == "::"
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert checked_clients(["10.1.2.3/8", "fd00::1"]) == ("10.0.0.0/8", "fd00::1/128")
    with pytest.raises(UsageError):
        checked_clients(["host"])


@pytest.mark.parametrize("line", ["boot w@latest --export nfs", "boot w@latest --pool lab", "test w@latest --pool lab"])
def test_who_may_not_serve_nfs_hears_it_before_anything_else(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XBFS_CONFIG", str(tmp_path))
    if "--pool" in line:
        assert main(line.split()) == 2
        told = capsys.readouterr().err
        assert "only root can serve NFS" in told
        assert "sudo" in told
    else:
        with pytest.raises(UsageError, match="only root"):
            plan_of(parse(line.split()), point("w"), system_runtime())
