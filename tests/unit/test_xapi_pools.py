"""Configured pools and their passwords: kept, changed by several at once, refused when others could read them."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.support.xapi_fake import PASSWORD, SECRETS, fake_hosts, make_certificate, pool_config, refuse
from xbfs_engine.core.errors import (
    CredentialsUnsafe,
    LoginRefused,
    PoolError,
    PoolExists,
    PoolUnknown,
    UsageError,
    XbfsError,
)
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi.config import Address, PoolConfig
from xbfs_engine.source.xapi.members import Member, members
from xbfs_engine.source.xapi.pools import PoolRegistry, config_directory
from xbfs_engine.source.xapi.session import open_pool

if TYPE_CHECKING:
    from pathlib import Path

PIN = ":".join(["AB"] * 32)
CONFIG = PoolConfig(
    "prod", (Address("xen1"), Address("fd00::1", 4443)), "backup", {"xen1": PIN, "10.0.0.2": PIN}, "xbfs/node"
)


@pytest.fixture
def registry(tmp_path: Path) -> PoolRegistry:
    return PoolRegistry(tmp_path / "config" / "xbfs", {"PROD_PASSWORD": "from-the-environment"})


def test_a_pool_comes_back_as_it_was_configured(registry: PoolRegistry) -> None:
    assert registry.pools() == []
    registry.add(CONFIG, PASSWORD)
    assert registry.get("prod") == CONFIG
    assert registry.pools() == [CONFIG]
    credentials = registry.credentials(CONFIG)
    assert (credentials.user, credentials.password) == ("backup", PASSWORD)


def test_secrets_are_in_one_file_that_only_its_owner_reads(registry: PoolRegistry) -> None:
    registry.add(CONFIG, PASSWORD)
    assert PASSWORD not in registry.pools_file.read_text()
    assert registry.credentials_file.stat().st_mode & 0o777 == 0o600
    assert registry.credentials_file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_credentials_that_others_can_use_are_refused(registry: PoolRegistry, mode: int) -> None:
    registry.add(CONFIG, PASSWORD)
    registry.credentials_file.chmod(mode)
    with pytest.raises(CredentialsUnsafe, match=str(registry.credentials_file)) as caught:
        registry.credentials(CONFIG)
    assert f"chmod 600 {registry.credentials_file}" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_credentials_of_another_user_are_refused(registry: PoolRegistry) -> None:
    registry.add(CONFIG, PASSWORD)
    os.chown(registry.credentials_file, 12345, -1)
    with pytest.raises(CredentialsUnsafe, match="another user") as caught:
        registry.credentials(CONFIG)
    assert "chown" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pools": {"prod": "hunter2"}}', '{"pools": {"prod": {}}}', "\x00"])
def test_damaged_credentials_are_not_quoted(registry: PoolRegistry, text: str) -> None:
    registry.add(CONFIG, PASSWORD)
    registry.credentials_file.write_text(text)
    with pytest.raises(CredentialsUnsafe) as caught:
        registry.credentials(CONFIG)
    assert "hunter2" not in str(caught.value)
    assert caught.value.hint


def test_passwords_by_reference(registry: PoolRegistry, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from-a-file\n")
    by_file = PoolConfig("a", CONFIG.addresses, "root", {}, "xbfs/node", password_file=str(file))
    by_variable = PoolConfig("b", CONFIG.addresses, "root", {}, "xbfs/node", password_env="PROD_PASSWORD")
    for config, password in ((by_file, "from-a-file"), (by_variable, "from-the-environment")):
        registry.add(config, None)
        assert registry.get(config.name) == config
        assert registry.credentials(config).password == password
    assert not registry.credentials_file.exists()


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe", b"x" * 10_000])
def test_a_password_that_is_not_there(registry: PoolRegistry, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    for config in (
        PoolConfig("a", CONFIG.addresses, "root", {}, "xbfs/node", password_file=str(file)),
        PoolConfig("b", CONFIG.addresses, "root", {}, "xbfs/node", password_env="NOT_SET"),
        CONFIG,
    ):
        with pytest.raises(LoginRefused, match=f"pool {config.name}"):
            registry.credentials(config)


def test_names(registry: PoolRegistry) -> None:
    registry.add(CONFIG, PASSWORD)
    with pytest.raises(PoolExists):
        registry.check_new("prod")
    for name in ("", "../up", "a/b", "-r", ".hidden", "a b", "x" * 65, "größe", "a\n"):
        with pytest.raises(UsageError):
            registry.check_new(name)
    for call in (registry.get, registry.remove):
        with pytest.raises(PoolUnknown):
            call("other")


def test_a_pool_that_is_removed_leaves_no_password(registry: PoolRegistry) -> None:
    registry.add(CONFIG, PASSWORD)
    registry.add(PoolConfig("other", CONFIG.addresses, "root", {}, "xbfs/node"), "kept")
    registry.remove("prod")
    assert [config.name for config in registry.pools()] == ["other"]
    assert PASSWORD not in registry.credentials_file.read_text()
    assert registry.credentials(registry.get("other")).password == "kept"


def test_several_change_it_at_once(registry: PoolRegistry, tmp_path: Path) -> None:
    def add(number: int) -> None:
        mine = PoolRegistry(tmp_path / "config" / "xbfs", {})
        mine.add(PoolConfig(f"pool{number}", CONFIG.addresses, "root", {}, "xbfs/node"), f"password{number}")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found = registry.pools()
    assert [config.name for config in found] == [f"pool{number}" for number in range(8)]
    assert [registry.credentials(config).password for config in found] == [f"password{n}" for n in range(8)]


GOOD = {"addresses": ["https://xen1"], "user": "root", "originator": "xbfs/n", "pins": {"xen1": PIN}}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"version": 1},
        {"version": 1, "pools": []},
        {"version": 2, "pools": {}},
        {"version": 1, "pools": {"a": []}},
        {"version": 1, "pools": {"a/b": GOOD}},
        *({"version": 1, "pools": {"a": {k: v for k, v in GOOD.items() if k != missing}}} for missing in GOOD),
        {"version": 1, "pools": {"a": GOOD | {"addresses": []}}},
        {"version": 1, "pools": {"a": GOOD | {"addresses": [1]}}},
        {"version": 1, "pools": {"a": GOOD | {"addresses": ["ftp://xen1"]}}},
        {"version": 1, "pools": {"a": GOOD | {"pins": {"xen1": "AB"}}}},
        {"version": 1, "pools": {"a": GOOD | {"user": None}}},
        {"version": 1, "pools": {"a": GOOD | {"password_file": 3}}},
    ],
)
def test_a_damaged_configuration_is_an_error_that_names_the_file(registry: PoolRegistry, document: object) -> None:
    registry.add(CONFIG, None)
    registry.pools_file.write_text(json.dumps(document))
    with pytest.raises(PoolError, match=str(registry.pools_file)) as caught:
        registry.pools()
    assert caught.value.hint


@given(st.binary(max_size=200))
def test_any_bytes_fail_typed(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    registry = PoolRegistry(tmp_path_factory.getbasetemp(), {})
    registry.pools_file.write_bytes(content)
    with pytest.raises(XbfsError):
        registry.pools()


def test_where_it_is_kept(tmp_path: Path) -> None:
    assert config_directory({"XBFS_CONFIG": str(tmp_path)}) == tmp_path
    assert config_directory({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "xbfs"
    assert config_directory({}).parts[-2:] == (".config", "xbfs")


def ask(tmp_path: Path, methods: dict[str, object]) -> list[Member]:
    """The members of a pool that answers with ``methods``."""

    async def run() -> list[Member]:
        async with open_pool(pool_config(host), SECRETS, system_runtime()) as pool:
            return await members(pool)

    with fake_hosts(tmp_path) as hosts:
        (host,) = hosts
        host.methods |= methods  # type: ignore[arg-type]
        return trio.run(run)


HOSTS = {
    "OpaqueRef:1": {"name_label": "xen1", "address": "10.0.0.1"},
    "OpaqueRef:2": {"name_label": "xen2", "address": "10.0.0.2"},
    "OpaqueRef:3": {"name_label": "joining", "address": ""},
}


def test_members_by_certificate_objects(tmp_path: Path) -> None:
    certificates = {
        "a": {"type": "host", "host": "OpaqueRef:1", "fingerprint_sha256": PIN},
        "b": {"type": "host_internal", "host": "OpaqueRef:2", "fingerprint_sha256": PIN},
        "c": {"type": "ca", "host": "OpaqueRef:NULL", "fingerprint_sha256": PIN},
    }
    found = ask(
        tmp_path,
        {
            "host.get_all_records": lambda _: HOSTS,
            "Certificate.get_all_records": lambda _: certificates,
            "host.get_server_certificate": refuse("HOST_OFFLINE", "OpaqueRef:2"),
        },
    )
    assert found == [Member("xen1", "10.0.0.1", PIN), Member("xen2", "10.0.0.2", "")]


def test_members_of_an_old_pool_by_what_their_hosts_show(tmp_path: Path) -> None:
    pem, fingerprint = make_certificate(tmp_path, "shown")
    found = ask(
        tmp_path,
        {
            "host.get_all_records": lambda _: HOSTS,
            "Certificate.get_all_records": refuse("MESSAGE_METHOD_UNKNOWN", "Certificate.get_all_records"),
            "host.get_server_certificate": lambda *_: pem.read_text(),
        },
    )
    assert [member.fingerprint for member in found] == [fingerprint, fingerprint]


@pytest.mark.parametrize(
    "methods",
    [
        {"host.get_all_records": lambda _: {"OpaqueRef:1": {}}, "Certificate.get_all_records": lambda _: {}},
        {
            "host.get_all_records": lambda _: HOSTS,
            "Certificate.get_all_records": lambda _: {"a": {"type": "host", "fingerprint": "none"}},
        },
        {
            "host.get_all_records": lambda _: HOSTS,
            "Certificate.get_all_records": lambda _: {},
            "host.get_server_certificate": lambda *_: "no certificate",
        },
    ],
)
def test_members_that_make_no_sense(tmp_path: Path, methods: dict[str, object]) -> None:
    with pytest.raises(PoolError):
        ask(tmp_path, methods)
