"""The session with a pool: logging in, calling, following the master, waiting for tasks.

``Xapi`` is what everybody else uses of a pool; ``Pool`` does it, and ``open_pool`` gives one that is logged in. All
methods may be called by many tasks at once.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.values import NULL_REF, Ref, XapiValue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from xbfs_engine.core.runtime import Runtime

__all__ = ["NULL_REF", "Address", "Credentials", "Pool", "PoolConfig", "Ref", "Xapi", "XapiValue", "open_pool"]


class Xapi(Protocol):
    """What one needs of a pool."""

    async def call(self, method: str, *arguments: XapiValue, timeout_s: float = 60.0) -> XapiValue:
        """Call ``method`` ("VM.get_record"); the session is added. Raises PoolError.

        XapiFailure: the host refused, with its code and parameters. LoginRefused: also a role that does not suffice.
        PoolUnreachable: no host answers or the connection broke; reads were tried again before, other calls were not
        and may have been executed. CertificateRejected: a host is not the one that was pinned.
        """
        ...

    async def run_task(
        self,
        method: str,
        *arguments: XapiValue,
        timeout_s: float,
        progress: Callable[[float], None] | None = None,
    ) -> str:
        """Call ``method`` as a task ("Async." is added), wait for its end and destroy it; the result, often a Ref.

        ``progress`` gets 0 to 1. Raises what ``call`` raises, XapiFailure with the task's error, and XapiFailure
        XBFS_TASK_TIMEOUT after ``timeout_s``; then, and when cancelled, the task is cancelled on the pool too.
        """
        ...

    async def records(self, cls: str) -> dict[Ref, dict[str, XapiValue]]:
        """All records of a class ("VM")."""
        ...

    @property
    def name(self) -> str:
        """The configured name of the pool."""
        ...

    @property
    def originator(self) -> str:
        """What our sessions are called on the pool: "xbfs/NODE"."""
        ...


class Pool(Xapi, Protocol):
    """A pool that is logged in, with what transfers need beside calls."""


@asynccontextmanager
async def open_pool(config: PoolConfig, secrets: Credentials, runtime: Runtime) -> AsyncIterator[Pool]:
    """A pool, logged in; leaving logs out. Raises PoolError."""
    raise NotImplementedError
    yield
