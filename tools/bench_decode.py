"""How fast this machine decodes: every chunk of the newest point fetched by one thread per core, nothing else done.

    bench_decode.py REPOSITORY SECONDS     prints MB/s; the passphrase comes from XBFS_PASSPHRASE

The limit of what any reader of cold data can reach; run by `bench_mount` with the product's own interpreter.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from xbfs_engine.catalog.blockmap import BlockMap, NodeStore
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.store.reader import ChunkReader
from xbfs_engine.store.repository import open_repository

if TYPE_CHECKING:
    from xbfs_engine.core.ids import ChunkRef

BATCH = 16


def main() -> None:
    """Open, list all chunks, then fetch them for a while."""
    repository = open_repository(LocalStorage(Path(sys.argv[1])), system_runtime(), os.environ["XBFS_PASSPHRASE"])
    catalog = Catalog(repository)
    catalog.refresh()
    disk = catalog.points()[-1].disks[0]
    reader = ChunkReader(repository.storage, repository.keys)
    leaves = [
        [ref for _, ref in leaf.children()] for _, leaf in BlockMap(NodeStore(reader), disk.root, disk.chunks).leaves()
    ]
    batches = [refs[at : at + BATCH] for refs in leaves for at in range(0, len(refs), BATCH)]
    sys.stdout.write(f"{rate(reader, batches, float(sys.argv[2])):.0f}\n")


def rate(reader: ChunkReader, batches: list[list[ChunkRef]], seconds: float) -> float:
    """Decoded MB/s of all threads together, of one pass over the disk or of as much as fits into ``seconds``."""
    todo = iter(batches)
    lock = threading.Lock()
    done = [0]
    started = time.perf_counter()

    def work() -> None:
        while time.perf_counter() < started + seconds:
            with lock:
                refs = next(todo, None)
            if refs is None:
                return
            size = sum(len(data) for data in reader.fetch(refs, ObjectKind.DATA_PACK))
            with lock:
                done[0] += size

    threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done[0] / 1e6 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
