"""The process behind the address: its socket, and how it ends."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from lightning_lora.errors import UserError
from lightning_lora.serving.middleware import AccessMiddleware

#: Seconds in which clients with an open connection are told to close it, before it is closed.
DRAIN_S = 0.5


class DrainingServer(uvicorn.Server):
    """A server that answers what it has accepted before it ends.

    Args:
        middleware: What answers.
        ready: Called when it accepts requests.
    """

    def __init__(self, middleware: AccessMiddleware, ready: Callable[[], None]) -> None:
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        super().__init__(uvicorn.Config(middleware, lifespan="off", ws="none", **quiet))
        self.middleware, self.ready = middleware, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept requests."""
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, answer what comes by the open ones, and then close them."""
        self.middleware.app.state.draining = True
        for listening in (self.servers, sockets or []):
            for each in listening:
                each.close()
        await asyncio.sleep(DRAIN_S)
        await super().shutdown(sockets)


def run_server(middleware: AccessMiddleware, address: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then those that are accepted."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # which uvicorn raises again when all is answered
    try:
        DrainingServer(middleware, ready).run([address])
    finally:
        signal.signal(signal.SIGTERM, before)


def bind(host: str, port: int, key: str | None) -> socket.socket:
    """Return a socket of the address, which does not listen yet.

    Raises:
        UserError: The address cannot be had, or others can reach it and there is no key.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if key is None and not ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback:
            raise UserError(
                f"--host: other machines can reach {host}, so a key is needed: set LIGHTNING_LORA_API_KEY, which "
                "clients send as 'Authorization: Bearer KEY'"
            )
        address = socket.socket(family, kind, protocol)
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address.bind(where)
    except OSError as error:
        raise UserError(f"--host, --port: cannot use {host}:{port} ({error}); choose another") from None
    return address
