"""One NBD connection: handshake, several reads in flight, replies straight into the caller's memory.

Made and closed by a task; belongs to it or to one thread at a time, and only ``stop`` is for others. Several
connections make a disk (``disk``). After any TransferFailed the connection is good for nothing but ``aclose``: a host
hangs up after every error it reports, and after most that it does not.
"""

from __future__ import annotations

import errno
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import trio

from xbfs_engine.core.errors import CertificateRejected, TransferFailed
from xbfs_engine.source.nbd import protocol
from xbfs_engine.source.nbd.stream import PlainStream
from xbfs_engine.source.nbd.target import NbdTarget, Timeouts, check_wildcard, tls_context

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_GOODBYE_S = 1.0


class _Pending(NamedTuple):
    """A read that was asked for."""

    offset: int
    view: memoryview


class NbdConnection:
    """A disk that was opened on a server."""

    def __init__(self, target: NbdTarget, stream: PlainStream, timeouts: Timeouts) -> None:
        self._target = target
        self._stream = stream
        self._timeouts = timeouts
        self._pending: dict[int, _Pending] = {}
        self._unsent = bytearray()
        self._head = memoryview(bytearray(protocol.REPLY_SIZE))
        self._cookie = 0
        self._answered = 0
        self.size_bytes = 0

    @classmethod
    async def open(cls, target: NbdTarget, *, timeouts: Timeouts = Timeouts()) -> Self:  # noqa: B008 - immutable
        """Connect, negotiate TLS if the target asks for it, open the export.

        Raises TransferFailed (unreachable, refused, too late), CertificateRejected.
        """
        context = tls_context(target.tls) if target.tls else None
        with _typed(target, timeouts.connect_s), trio.fail_after(timeouts.connect_s):
            self = cls(target, await PlainStream.connect(target.host, target.port), timeouts)
            try:
                await self._stream.drive(self._handshake(context))
            except BaseException:
                self._stream.close()
                raise
        return self

    @property
    def suspect(self) -> int:
        """Cookie of the read that broke the connection: the one being answered, or else the oldest in flight."""
        return self._answered if self._answered in self._pending else next(iter(self._pending))

    def ask(self, offset: int, view: memoryview) -> int:
        """Ask for the bytes at ``offset`` (with the next ``reply``) and return the cookie of their reply.

        ``view`` belongs to the connection until then. Offset and length are multiples of 512 but at the disk's end.
        """
        assert offset + len(view) <= self.size_bytes
        self._cookie += 1
        self._pending[self._cookie] = _Pending(offset, view)
        self._unsent += protocol.read_request(self._cookie, offset, len(view))
        return self._cookie

    def reply(self) -> int:
        """Take the next reply into its memory; returns the cookie. Blocks: for threads. Raises TransferFailed.

        Servers may answer in any order; hosts keep to that of the requests.
        """
        with _typed(self._target, self._timeouts.message_s):
            return self._stream.drive_blocking(self._reply(), self._timeouts.message_s)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read one piece of at most 4 MiB; nothing else may be in flight. Raises TransferFailed."""
        assert not self._pending
        self.ask(offset, view)
        with _typed(self._target, self._timeouts.message_s), trio.fail_after(self._timeouts.message_s):
            await self._stream.drive(self._reply())

    def stop(self) -> None:
        """Let a thread that waits for a reply get TransferFailed at once."""
        self._stream.stop_receiving()

    async def aclose(self) -> None:
        """Say good-bye, if that is possible at once, and hang up: so the host lets go of the disk sooner."""
        with trio.move_on_after(_GOODBYE_S, shield=True):
            try:
                if not self._pending:
                    await self._stream.drive(self._stream.send(protocol.disconnect_request()))
            except (OSError, TransferFailed):
                pass
            finally:
                self._stream.close()

    def _reply(self) -> Generator[int, None, int]:
        assert self._pending
        if self._unsent:
            yield from self._stream.send(self._unsent)
            self._unsent = bytearray()
        yield from self._stream.fill(self._head)
        error, cookie = protocol.reply(self._head)
        pending, self._answered = self._pending.get(cookie), cookie
        if pending is None:
            raise TransferFailed("the NBD server answered what was not asked: the stream is out of step")
        if error:
            name = errno.errorcode.get(error, str(error))
            raise TransferFailed(f"the NBD server can not read offset {pending.offset}: {name}")
        yield from self._stream.fill(pending.view)
        del self._pending[cookie]
        return cookie

    def _handshake(self, context: ssl.SSLContext | None) -> Generator[int, None, None]:
        protocol.check_greeting((yield from self._take(protocol.GREETING_SIZE)))
        yield from self._stream.send(protocol.CLIENT_FLAGS)
        if context is not None:
            yield from self._start_tls(context)
        yield from self._stream.send(protocol.option(protocol.OPTION_EXPORT_NAME, self._target.export_name.encode()))
        try:
            answer = yield from self._take(protocol.EXPORT_SIZE)
        except (TransferFailed, OSError) as exc:
            # Whatever keeps a host from opening the disk, all it does is hang up.
            raise TransferFailed(
                "the NBD server hung up instead of opening the disk",
                hint="session expired, VDI gone or in use, or all 16 NBD connections of the host taken",
            ) from exc
        self.size_bytes = protocol.export_size(answer)

    def _start_tls(self, context: ssl.SSLContext) -> Generator[int, None, None]:
        assert self._target.tls is not None
        yield from self._stream.send(protocol.option(protocol.OPTION_STARTTLS))
        answer = protocol.option_reply((yield from self._take(protocol.OPTION_REPLY_SIZE)), protocol.OPTION_STARTTLS)
        if answer.kind != protocol.REPLY_ACK or answer.text_bytes:
            # Never go on in plain: the export's name is a secret.
            raise TransferFailed(
                "the NBD server refuses TLS", hint="give the network the purpose nbd, not insecure_nbd"
            )
        stream = self._stream.start_tls(context, self._target.tls.subject if context.check_hostname else None)
        yield from stream.shake_hands()
        self._stream = stream
        check_wildcard(self._target.tls, stream.peer)

    def _take(self, size: int) -> Generator[int, None, bytes]:
        data = bytearray(size)
        yield from self._stream.fill(memoryview(data))
        return bytes(data)


@contextmanager
def _typed(target: NbdTarget, patience_s: float) -> Iterator[None]:
    """Say which server failed. Foreign messages are passed on only where they can not hold the export's name."""
    try:
        yield
    except TransferFailed as exc:
        raise TransferFailed(f"{target.place}: {exc.message}", hint=exc.hint) from exc
    except CertificateRejected as exc:
        raise CertificateRejected(f"{target.place}: {exc.message}", hint=exc.hint) from exc
    except trio.TooSlowError as exc:
        raise TransferFailed(f"{target.place}: no answer from the NBD server within {patience_s:g} s") from exc
    except ssl.SSLCertVerificationError as exc:
        raise CertificateRejected(
            f"{target.place}: the NBD server's certificate is not the one that XAPI vouches for: {exc.verify_message}",
            hint="somebody may sit between, or the host's certificate was renewed a moment ago: try again",
        ) from exc
    except (OSError, ValueError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise TransferFailed(f"{target.place}: NBD connection failed: {reason}") from exc
