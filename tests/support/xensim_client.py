"""The published XenAPI package as a client of the simulator."""

from __future__ import annotations

import ssl
import xmlrpc.client
from typing import TYPE_CHECKING, Any

import XenAPI

from tests.support.xensim import BACKUP_USER

if TYPE_CHECKING:
    from tests.support.xensim import XenSim


class Api:
    """A session: ``api.VDI.snapshot(ref, {})``; errors are ``api.Failure``, whose text begins with the code."""

    Failure = XenAPI.Failure

    def __init__(self, sim: XenSim, user: str, password: str) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._transport = xmlrpc.client.SafeTransport(context=context)
        self._session = XenAPI.Session(sim.master.url, transport=self._transport)
        self._session.xenapi.login_with_password(user, password, "1.0", "tests")

    @property
    def ref(self) -> str:
        """The secret reference of the session."""
        return str(self._session._session)

    def logout(self) -> None:
        """End the session."""
        self._session.xenapi.session.logout()
        self.close()

    def close(self) -> None:
        """Drop the connection only."""
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session.xenapi, name)


def login(sim: XenSim, user: str = str(BACKUP_USER["name"]), password: str = str(BACKUP_USER["password"])) -> Api:
    """A session of the backup account, or of another."""
    return Api(sim, user, password)
