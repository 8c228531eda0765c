"""Registry hives for tests: built here in all the forms that Windows writes, and made and read by hivex, their peer."""

from __future__ import annotations

import json
import struct
import subprocess
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Keys: TypeAlias = Union["Mapping[str, Keys]", bytes]
"""A key's values (bytes) and keys."""

PEER = "/usr/bin/python3"
"""The system's Python: there Debian's python3-hivex is."""

NONE = 0xFFFFFFFF
SEGMENT = 16344


def why_no_peer() -> str:
    try:
        done = subprocess.run([PEER, "-c", "import hivex"], capture_output=True, check=False)
    except OSError:
        return "there is no system Python"
    return "python3-hivex is not installed" if done.returncode else ""


class _Builder:
    def __init__(self, form: str) -> None:
        self.form = form
        self.cells = bytearray(struct.pack("<4sII8sQI", b"hbin", 0, 0, bytes(8), 0, 0))
        self.security = self.cell(struct.pack("<2sHIIII", b"sk", 0, 32, 32, 1, 20) + b"\1\0\4\x80" + bytes(16))

    def cell(self, content: bytes) -> int:
        at = len(self.cells)
        size = (4 + len(content) + 7) // 8 * 8
        self.cells += struct.pack("<i", -size) + content.ljust(size - 4, b"\0")
        return at

    def key(self, name: str, content: Mapping[str, Keys], parent: int, flags: int = 0) -> int:
        raw, latin = _name(name)
        flags |= 0x20 * latin
        at = self.cell(bytes(76) + raw)
        keys = [(k, v) for k, v in sorted(content.items()) if not isinstance(v, bytes)]
        values = [self.value(k, v) for k, v in content.items() if isinstance(v, bytes)]
        subkeys = [(k, self.key(k, v, at)) for k, v in keys if not isinstance(v, bytes)]
        keys_at = self.list(subkeys) if subkeys else NONE
        values_at = self.cell(b"".join(struct.pack("<I", value) for value in values)) if values else NONE
        fields = (len(keys), 0, keys_at, NONE, len(values), values_at, self.security, NONE, 510, 0, 510, 1 << 20, 0)
        struct.pack_into("<2sH8s15I2H", self.cells, at + 4, b"nk", flags, bytes(8), 0, parent, *fields, len(raw), 0)
        return at

    def list(self, keys: list[tuple[str, int]]) -> int:
        if self.form == "ri" and len(keys) > 1:
            half = len(keys) // 2
            leaves = [self.leaf("lh", keys[:half]), self.leaf("li", keys[half:])]
            return self.cell(b"ri" + struct.pack("<H2I", 2, *leaves))
        return self.leaf("lh" if self.form == "ri" else self.form, keys)

    def leaf(self, kind: str, keys: list[tuple[str, int]]) -> int:
        rows = (struct.pack("<I", at) + (b"" if kind == "li" else _hash(kind, name)) for name, at in keys)
        return self.cell(kind.encode() + struct.pack("<H", len(keys)) + b"".join(rows))

    def value(self, name: str, data: bytes) -> int:
        raw, latin = _name(name)
        if len(data) <= 4:
            size, at = len(data) | 1 << 31, int.from_bytes(data.ljust(4, b"\0"), "little")
        elif len(data) <= SEGMENT:
            size, at = len(data), self.cell(data)
        else:
            parts = [self.cell(data[i : i + SEGMENT] + bytes(4)) for i in range(0, len(data), SEGMENT)]
            listed = self.cell(struct.pack(f"<{len(parts)}I", *parts))
            size, at = len(data), self.cell(struct.pack("<2sHII", b"db", len(parts), listed, 0))
        return self.cell(struct.pack("<2sHIIIHH", b"vk", len(raw), size, at, 3, latin, 0) + raw)


def build(
    content: Mapping[str, Keys], form: Literal["lf", "lh", "li", "ri"] = "lh", sequences: tuple[int, int] = (7, 7)
) -> bytes:
    """A hive; ``form`` is that of its lists of keys. It is dirty if its sequence numbers differ."""
    builder = _Builder(form)
    root = builder.key("ROOT", content, NONE, 0x0C)
    cells = builder.cells
    left = -len(cells) % 4096 or 4096
    cells += struct.pack("<i", left) + bytes(left - 4)
    struct.pack_into("<II", cells, 4, 0, len(cells))
    base = bytearray(4096)
    fields = (1, 5, 0, 1, root, len(cells), 1)
    struct.pack_into("<4sII8s7I", base, 0, b"regf", *sequences, bytes(8), *fields)
    return seal(bytes(base + cells))


def seal(hive: bytes) -> bytes:
    """With the right checksum of its base block."""
    checksum = 0
    for word in struct.unpack_from("<127I", hive):
        checksum ^= word
    return hive[:508] + struct.pack("<I", {0: 1, NONE: NONE - 1}.get(checksum, checksum)) + hive[512:]


def mounted_devices(devices: Mapping[str, bytes]) -> dict[str, Keys]:
    """What a system's hive holds, with letters and volumes by the names of their values."""
    return {"Select": {"Current": b"\1\0\0\0"}, "ControlSet001": {"Services": {}}, "MountedDevices": dict(devices)}


def peer_write(path: Path, content: Mapping[str, Keys]) -> None:
    """Have hivex write keys and values into a hive that has none."""
    path.write_bytes(build({}))
    _peer(_WRITE, path, json.dumps(to_json(content)))


def peer_read(path: Path) -> object:
    """What hivex finds, as `to_json`."""
    return json.loads(_peer(_READ, path, ""))


def to_json(content: Keys) -> object:
    """With values in hexadecimal digits."""
    if isinstance(content, bytes):
        return content.hex()
    return {name: to_json(value) for name, value in content.items()}


def _peer(program: str, path: Path, text: str) -> str:
    done = subprocess.run([PEER, "-c", program, str(path)], input=text, capture_output=True, text=True, check=True)
    return done.stdout


_WRITE = """
import hivex, json, sys
hive = hivex.Hivex(sys.argv[1], write=True)
def fill(node, content):
    values = [{"key": k, "t": 3, "value": bytes.fromhex(v)} for k, v in content.items() if isinstance(v, str)]
    hive.node_set_values(node, values)
    for name, below in content.items():
        if not isinstance(below, str):
            fill(hive.node_add_child(node, name), below)
fill(hive.root(), json.load(sys.stdin))
hive.commit(None)
"""

_READ = """
import hivex, json, sys
hive = hivex.Hivex(sys.argv[1])
def dump(node):
    found = {hive.value_key(v): hive.value_value(v)[1].hex() for v in hive.node_values(node)}
    found.update({hive.node_name(n): dump(n) for n in hive.node_children(node)})
    return found
print(json.dumps(dump(hive.root())))
"""


def _name(name: str) -> tuple[bytes, bool]:
    try:
        return name.encode("latin-1"), True
    except UnicodeEncodeError:
        return name.encode("utf-16-le"), False


def _hash(kind: str, name: str) -> bytes:
    if kind == "lf":
        return name.encode("latin-1", "replace")[:4].ljust(4, b"\0")
    number = 0
    for char in name.upper():
        number = (number * 37 + ord(char)) & NONE
    return struct.pack("<I", number)
