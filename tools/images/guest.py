"""What a small guest holds and what a day does to it: files of this system, a log, an SQLite database.

Writes through ``ext4.Session`` only. The same files on the host give the same disks on every run.
"""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from images import disk, ext4

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST_DAY_S = 1_700_000_000
SECOND_DAY_S = FIRST_DAY_S + 86_400

_DISK_UUID = "3b0f9a54-5a7e-4a53-8f4a-0d6c1c6b7a01"
_PARTITION_UUID = "3b0f9a54-5a7e-4a53-8f4a-0d6c1c6b7a02"
ROOT_UUID = "3b0f9a54-5a7e-4a53-8f4a-0d6c1c6b7a03"

_STDLIB = sysconfig.get_path("stdlib")
_LOG = PurePosixPath("/var/log/app/access.log")
_DATABASE = PurePosixPath("/var/lib/app/app.db")


@dataclass(frozen=True, slots=True)
class Variant:
    """Size and content of one kind of guest; ``trees`` are host directories with how many bytes to take of each."""

    disk_bytes: int
    trees: tuple[tuple[str, int], ...]
    log_lines: int
    accounts: int


TINY = Variant(48 << 20, ((_STDLIB, 14 << 20), ("/usr/bin", 6 << 20)), 8_000, 4_000)
SMALL = Variant(
    3 << 29,
    (
        ("/usr/bin", 120 << 20),
        ("/usr/lib/x86_64-linux-gnu", 160 << 20),
        (_STDLIB, 60 << 20),
        ("/usr/share", 100 << 20),
    ),
    400_000,
    200_000,
)


@dataclass(frozen=True, slots=True)
class _File:
    path: PurePosixPath
    host: Path
    link: str | None


def first_generation(image: Path, variant: Variant, work: Path) -> None:
    """Make the disk as it was after installation; ``work`` is a scratch directory kept for the second generation."""
    disk.create(image, variant.disk_bytes)
    size_bytes = disk.partition(image, disk_uuid=_DISK_UUID, partition_uuid=_PARTITION_UUID)
    ext4.make(image, size_bytes, uuid=ROOT_UUID, time_s=FIRST_DAY_S)
    session = ext4.Session(image, time_s=FIRST_DAY_S)
    for index, file in enumerate(_system_files(variant)):
        if not _installed_later(index):
            _install(session, file)
    for name, text in _identity("guest-1").items():
        source = work / name
        source.write_text(text)
        source.chmod(0o644)
        session.write(PurePosixPath("/etc") / name, source)
    session.commit()
    add_application(image, work, log_lines=variant.log_lines, accounts=variant.accounts)


def second_generation(image: Path, variant: Variant, work: Path) -> None:
    """Turn a copy of the first generation into the next day's, changing the same filesystem in place."""
    session = ext4.Session(image, time_s=SECOND_DAY_S)
    upgraded = work / "upgraded"
    upgraded.mkdir()
    for index, file in enumerate(_system_files(variant)):
        if _installed_later(index):
            _install(session, file)
        elif index % 80 == 3:
            session.remove(file.path)
        elif index % 100 == 5 and file.link is None:
            data, new = file.host.read_bytes(), upgraded / str(index)
            new.write_bytes(data[: len(data) // 2] + b"\nupgraded\n" + data[len(data) // 2 :])
            new.chmod(stat.S_IMODE(file.host.stat().st_mode))
            session.replace(file.path, new)
    session.commit()
    use_application(image, work, log_lines=variant.log_lines // 20, accounts=variant.accounts)


def add_application(image: Path, work: Path, *, log_lines: int, accounts: int) -> None:
    """Put a log and a database on the disk; their bytes stay in ``work`` for ``use_application``."""
    log, database = work / _LOG.name, work / _DATABASE.name
    with log.open("wb") as file:
        file.writelines(_log_lines(1, log_lines))
    _make_database(database, accounts)
    log.chmod(0o640)
    database.chmod(0o600)
    session = ext4.Session(image, time_s=FIRST_DAY_S)
    for path, source in ((_LOG, log), (_DATABASE, database)):
        session.write(path, source)
    session.commit()


def use_application(image: Path, work: Path, *, log_lines: int, accounts: int) -> None:
    """Append to the log, and run many small transactions on the database, in the blocks it has."""
    log, database = work / _LOG.name, work / _DATABASE.name
    with log.open("ab") as file:
        file.writelines(_log_lines(2, log_lines))
    session = ext4.Session(image, time_s=SECOND_DAY_S)
    session.replace(_LOG, log)
    session.commit()
    before = database.read_bytes()
    _run_transactions(database, accounts)
    ext4.overwrite(image, _DATABASE, before, database.read_bytes())


def _installed_later(index: int) -> bool:
    return index % 32 == 7


def _install(session: ext4.Session, file: _File) -> None:
    if file.link is None:
        session.write(file.path, file.host)
    else:
        session.symlink(file.path, file.link)


def _system_files(variant: Variant) -> Iterator[_File]:
    """Files and symbolic links below the variant's trees, sorted, each tree up to its budget."""
    for top, budget_bytes in variant.trees:
        left = budget_bytes
        for directory, names, files in os.walk(top):
            names[:] = sorted(name for name in names if name != "__pycache__" and _plain(name))
            for name in sorted(filter(_plain, files)):
                host = Path(directory, name)
                status = host.lstat()
                if stat.S_ISLNK(status.st_mode):
                    target = str(host.readlink())
                    if _plain(target):
                        yield _File(PurePosixPath(host), host, target)
                elif stat.S_ISREG(status.st_mode) and status.st_size <= left // 4 and os.access(host, os.R_OK):
                    left -= status.st_size
                    yield _File(PurePosixPath(host), host, None)


def _plain(name: str) -> bool:
    """Whether debugfs's command parser takes the name as it is."""
    return name.isascii() and name.isprintable() and not set(name) & set('"\\')


def _identity(hostname: str) -> dict[str, str]:
    return {
        "hostname": f"{hostname}\n",
        "fstab": f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n",
        "os-release": 'PRETTY_NAME="XBFS test guest"\nID=xbfs-test\nVERSION_ID="1"\n',
        "passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/var/lib/app:/usr/sbin/nologin\n",
    }


def _log_lines(seed: int, count: int) -> Iterator[bytes]:
    chance, time_s = random.Random(seed), float(FIRST_DAY_S)
    for _ in range(count):
        time_s += chance.random()
        yield (
            f"10.{chance.randrange(256)}.{chance.randrange(256)}.7 [{time_s:.3f}] "
            f'"GET /item/{chance.randrange(100_000)} HTTP/1.1" {chance.choice((200, 200, 304, 404))}\n'
        ).encode()


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit: every statement of ours is a transaction. Deleted pages keep their bytes, as on most servers.
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA secure_delete=OFF;")
    return database


def _make_database(path: Path, accounts: int) -> None:
    """A database with free pages inside, so that the next day's inserts do not make the file longer."""
    chance = random.Random(3)
    database = _connect(path)
    database.executescript(
        "CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER, note TEXT);"
        "CREATE TABLE history(account INTEGER, amount INTEGER, note BLOB);"
        "CREATE TABLE filler(data BLOB);"
    )
    database.execute("BEGIN")
    rows = ((number, 0, chance.randbytes(40).hex()) for number in range(accounts))
    database.executemany("INSERT INTO account VALUES(?, ?, ?)", rows)
    database.executemany("INSERT INTO filler VALUES(?)", ((chance.randbytes(1000),) for _ in range(accounts // 10)))
    database.execute("COMMIT")
    database.execute("DROP TABLE filler")
    database.close()


def _run_transactions(path: Path, accounts: int) -> None:
    chance = random.Random(4)
    database = _connect(path)
    for _ in range(accounts // 20):
        account, amount = chance.randrange(accounts), chance.randrange(1000)
        database.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, account))
        database.execute("INSERT INTO history VALUES(?, ?, ?)", (account, amount, chance.randbytes(200)))
    database.close()
