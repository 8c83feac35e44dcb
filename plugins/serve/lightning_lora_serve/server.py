"""The process behind the address: what each request passes before the application sees it, and how the process ends."""

import asyncio
import hmac
import ipaddress
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lightning_lora.errors import UserError

#: Seconds in which clients with an open connection are told to close it, before it is closed.
DRAIN_S = 0.5
#: A body that is too large is read on, so that the client gets its answer, up to so many times the limit.
DISCARDED = 16
#: What needs no key.
_OPEN = "/health"


class ServingMetrics:
    """What Prometheus reads of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix, sizes = "lightning_lora", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        self.requests = Counter(f"{prefix}_requests", "HTTP requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(f"{prefix}_request_seconds", "From request to answer.", registry=self.registry)
        self.texts = Counter(f"{prefix}_texts", "Texts predicted.", ["run"], registry=self.registry)
        self.tokens = Counter(f"{prefix}_tokens", "Tokens, as batches count them.", ["run"], registry=self.registry)
        self.batch_texts = Histogram(f"{prefix}_batch_texts", "Texts a batch.", buckets=sizes, registry=self.registry)
        self.batch_seconds = Histogram(f"{prefix}_batch_seconds", "Time of a batch.", registry=self.registry)
        self.waiting = Gauge(f"{prefix}_waiting_texts", "Texts accepted and not answered.", registry=self.registry)


class AccessMiddleware:
    """Lets requests pass to the application that have the key, if there is one, and no larger body than is allowed.

    Clients send the key as ``Authorization: Bearer KEY``.
    """

    def __init__(self, app: FastAPI, key: str | None, body_mb: float, metrics: ServingMetrics) -> None:
        self.app = app
        self.metrics = metrics
        self._expected = None if key is None else f"Bearer {key}".encode()
        self._most = int(body_mb * 1e6)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        start, status = time.perf_counter(), 500

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.app.state.draining:  # else a client would send its next request to nobody
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            if not self._authorized(scope):
                refusal = JSONResponse({"detail": "a key is needed"}, 401, {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, answer)
            elif (body := await self._read(receive)) is None:
                refusal = JSONResponse({"detail": f"the body is larger than {self._most:,} bytes"}, 413)
                await refusal(scope, receive, answer)
            else:
                await self.app(scope, _giving(body, receive), answer)
        except Exception as error:  # its message may hold a text
            print(f"error: {scope['path'][:40]!r} failed: {type(error).__name__}", file=sys.stderr)
            traceback.print_tb(error.__traceback__)
        route = scope.get("route")
        self.metrics.requests.labels(getattr(route, "path", "other"), status).inc()
        self.metrics.seconds.observe(time.perf_counter() - start)

    def _authorized(self, scope: Any) -> bool:
        if self._expected is None or scope["path"] == _OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)

    async def _read(self, receive: Any) -> bytes | None:
        """Return the whole body, or None if it is too large or the client has gone."""
        parts, total = list[bytes](), 0
        while total <= DISCARDED * self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            total += len(message.get("body", b""))
            if total <= self._most:
                parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        return b"".join(parts) if total <= self._most else None


def _giving(body: bytes, receive: Any) -> Any:
    """Return a channel that gives a body that was read, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Any:
        return messages.pop() if messages else await receive()

    return give


class DrainingServer(uvicorn.Server):
    """A server that calls ``ready`` when it accepts requests, and answers what it has accepted before it ends."""

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
    """Return a socket of the address, which does not listen yet; one that others reach needs a key."""
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
