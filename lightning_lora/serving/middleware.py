"""What each request passes before the application sees it: the key, and the size of its body."""

import hmac
import sys
import time
import traceback
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from lightning_lora.serving.metrics import ServingMetrics

#: A body that is too large is read on, so that the client gets its answer, up to so many times the limit.
DISCARDED = 16
#: What needs no key.
_OPEN = "/health"


class AccessMiddleware:
    """The ASGI application around the application.

    Args:
        app: The application.
        key: What clients must send as ``Authorization: Bearer KEY``; None for none.
        body_mb: Megabytes of a body at most.
        metrics: What is counted.
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
