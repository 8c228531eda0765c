"""A server process of the tests, started from this tree: what it says first, its log, its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
END_S = 20


class ServerProcess:
    """One at a time, of the module that ``spawn`` names; what it writes to stderr is added to ``log``."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server: subprocess.Popen[str] | None = None

    def spawn(self, module: str, *words: object) -> str:
        """Start it; the first line that it says. One that ends without a word raises its log."""
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, words)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "engine")])},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        if not line:
            self.wait()
            raise AssertionError(self.log.read_text())
        return line

    def wait(self) -> int:
        """The server's exit code, once it has ended by itself."""
        assert self.server is not None
        code = self.server.wait(END_S)
        assert self.server.stdout is not None
        self.server.stdout.close()
        return code
