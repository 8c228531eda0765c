"""Addresses, values on the wire, failures and their meaning, fingerprints: the pure parts of talking to a pool."""

from __future__ import annotations

import subprocess
import xmlrpc.client
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.xapi_fake import PASSWORD, SESSION, make_certificate
from xbfs_engine.core.errors import CertificateRejected, LoginRefused, PoolError, UsageError, XapiFailure, XbfsError
from xbfs_engine.source.xapi.config import Address, Credentials
from xbfs_engine.source.xapi.failures import Handling, failure, handling_of, meaning_of, role_for
from xbfs_engine.source.xapi.trust import fingerprint_of_pem, parse_fingerprint
from xbfs_engine.source.xapi.values import from_wire, to_wire

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.source.xapi.values import XapiValue

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]))
PLAIN = TEXT | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://xen1.example.org", Address("xen1.example.org")),
        ("https://xen1.example.org/", Address("xen1.example.org")),
        ("xen1", Address("xen1")),
        ("10.0.0.1:4443", Address("10.0.0.1", 4443)),
        ("https://[fe80::1%eth0]:8443/", Address("fe80::1%eth0", 8443)),
        ("[fd00::1]", Address("fd00::1")),
        ("fd00::1", Address("fd00::1")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected
    assert Address.parse(f"https://{expected}") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://xen1",
        "https://",
        "xen1:0",
        "xen1:65536",
        "xen1:x",
        "xen1/RPC2",
        "root@xen1",
        "xen1\r\nx",
        "[::1",
        "[]",
        "[::1]x",
        "https://xen1:443:443/",
        "xen 1",
        "https://xen1?x=1",
        "xen1:99999999999999",
        "[xen1]",
        "fd00:::1",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert caught.value.hint


@given(st.text(max_size=30))
def test_addresses_of_any_text_fail_typed_or_come_back(text: str) -> None:
    try:
        address = Address.parse(text)
    except UsageError:
        return
    assert Address.parse(str(address)) == address


@given(VALUES)
def test_values_survive_the_wire(value: XapiValue) -> None:
    sent = xmlrpc.client.dumps((to_wire(value),), allow_none=True)
    (received,), _ = xmlrpc.client.loads(sent)
    assert from_wire(received) == _as_xml(value)


def _as_xml(value: XapiValue) -> XapiValue:
    """XML parsers make every end of a line one line feed."""
    match value:
        case str():
            return value.replace("\r\n", "\n").replace("\r", "\n")
        case list():
            return [_as_xml(item) for item in value]
        case dict():
            return {str(_as_xml(key)): _as_xml(item) for key, item in value.items()}
        case _:
            return value


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_integers_are_strings_whatever_their_size(value: int) -> None:
    assert to_wire(value) == str(value)


@pytest.mark.parametrize("text", ["20260920T21:00:03Z", "2026-09-20T21:00:03Z", "20260920T21:00:03"])
def test_times_are_utc(text: str) -> None:
    assert from_wire(xmlrpc.client.DateTime(text)) == datetime(2026, 9, 20, 21, 0, 3, tzinfo=UTC)


def test_times_are_sent_as_xapi_writes_them() -> None:
    local = datetime(2026, 9, 20, 23, 0, 3, tzinfo=timezone(timedelta(hours=2)))
    assert str(to_wire(local)) == "20260920T21:00:03Z"


@pytest.mark.parametrize(
    "value", [b"bytes", xmlrpc.client.DateTime("soon"), xmlrpc.client.Binary(b"x"), {"a": object()}]
)
def test_what_xapi_never_sends(value: object) -> None:
    with pytest.raises(PoolError):
        from_wire(value)


def test_text_that_xml_can_not_carry_is_refused_and_not_repeated() -> None:
    with pytest.raises(PoolError) as caught:
        to_wire(["root", "pass\x00word"])
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "handling"),
    [
        ("VDI_IN_USE", Handling.BUSY),
        ("OTHER_OPERATION_IN_PROGRESS", Handling.BUSY),
        ("TOO_MANY_PENDING_TASKS", Handling.BUSY),
        ("SR_BACKEND_FAILURE_82", Handling.BUSY),
        ("SR_BACKEND_FAILURE_40", Handling.TRANSIENT),
        ("HOST_OFFLINE", Handling.TRANSIENT),
        ("HANDLE_INVALID", Handling.GONE),
        ("UUID_INVALID", Handling.GONE),
        ("LICENCE_RESTRICTION", Handling.UNSUPPORTED),
        ("SR_BACKEND_FAILURE_460", Handling.UNSUPPORTED),
        ("MESSAGE_PARAMETER_COUNT_MISMATCH", Handling.UNSUPPORTED),
        ("OPERATION_BLOCKED", Handling.REFUSED),
        ("SR_BACKEND_FAILURE_109", Handling.REFUSED),
        ("SR_BACKEND_FAILURE", Handling.REFUSED),
        ("SR_BACKEND_FAILURE_4711", Handling.REFUSED),
        ("NEVER_HEARD_OF", Handling.REFUSED),
    ],
)
def test_each_code_has_a_meaning(code: str, handling: Handling) -> None:
    error = failure("VM.snapshot", [code, "OpaqueRef:1", "", "[opterr=x]"])
    assert isinstance(error, XapiFailure)
    assert handling_of(error) is handling is meaning_of(code).handling
    assert str(error).startswith("VM.snapshot: ")
    assert code in str(error)
    assert "[opterr=x]" in str(error)
    assert error.params == ("OpaqueRef:1", "", "[opterr=x]")


@pytest.mark.parametrize(
    "params",
    [
        ("SESSION_INVALID", SESSION),
        ("HANDLE_INVALID", "session", SESSION),
        ("INTERNAL_ERROR", f"Failure at /export?vdi=1&session_id={SESSION}&x=1"),
        ("VDI_IN_USE", "/5f1c?session_id=OpaqueRef:another"),
        ("INTERNAL_ERROR", f"login root {PASSWORD} failed"),
        ("SESSION_AUTHENTICATION_FAILED", "root", PASSWORD),
        ("RBAC_PERMISSION_DENIED", "vm.start", f"no permission for {SESSION}"),
    ],
)
def test_secrets_are_in_no_error(params: tuple[str, ...]) -> None:
    error = failure("VM.start", params, secrets=(SESSION, PASSWORD))
    told = f"{error!r} {error} {error.hint} {getattr(error, 'params', '')}"
    for secret in (SESSION, PASSWORD, "OpaqueRef:another"):
        assert secret not in told


def test_stack_traces_are_told_in_one_line() -> None:
    error = failure("VM.start", ["SR_BACKEND_FAILURE_1200", "", "Traceback:\n  File\n\tline 1"])
    assert "Traceback: File line 1" in str(error)


def test_credentials_hide_their_password() -> None:
    assert PASSWORD not in repr(Credentials("root", PASSWORD))


def test_long_parameters_are_cut() -> None:
    error = failure("VM.start", ["SR_BACKEND_FAILURE_1200", "", "Traceback " * 10_000])
    assert len(str(error)) < 1000


def test_an_empty_description_is_an_error_too() -> None:
    assert isinstance(failure("VM.start", []), XapiFailure)


@pytest.mark.parametrize(
    ("permission", "role"),
    [
        ("vm.snapshot", "vm-power-admin"),
        ("async.vdi.enable_cbt", "vm-power-admin"),
        ("SR.create", "pool-operator"),
        ("pbd.plug", "pool-operator"),
        ("network.add_purpose", "pool-admin"),
        ("network.create", "pool-operator"),
        ("vtpm.get_contents", "the local root user"),
    ],
)
def test_the_least_role_is_named(permission: str, role: str) -> None:
    assert role_for(permission) == role
    error = failure("x", ["RBAC_PERMISSION_DENIED", permission, "no"])
    assert isinstance(error, LoginRefused)
    assert role in error.hint


def test_fingerprints_are_openssls(tmp_path: Path) -> None:
    pem, expected = make_certificate(tmp_path, "host")
    told = subprocess.run(
        ["openssl", "x509", "-in", pem, "-noout", "-fingerprint", "-sha256"], capture_output=True, text=True, check=True
    ).stdout
    assert parse_fingerprint(told.strip()) == expected
    assert fingerprint_of_pem(pem.read_text()) == expected
    assert parse_fingerprint(expected.lower().replace(":", "")) == expected


@given(st.text(max_size=200))
def test_any_text_as_certificate_or_fingerprint_fails_typed(text: str) -> None:
    for parse in (parse_fingerprint, fingerprint_of_pem):
        with pytest.raises(CertificateRejected) as caught:
            parse(text)
        assert isinstance(caught.value, XbfsError)


@pytest.mark.parametrize("inner", ["", "!!!!", "AAAA", "é"])
def test_a_certificate_that_is_none(inner: str) -> None:
    with pytest.raises(CertificateRejected):
        fingerprint_of_pem(f"-----BEGIN CERTIFICATE-----\n{inner}\n-----END CERTIFICATE-----\n")
