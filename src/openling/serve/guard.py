"""What every request passes before its route: request id, key, Host, size and time of the body; how failures are answered.

Deny by default: a path that is not listed as open needs an API key, and admin paths need the admin key. Nothing of a request's
content is logged, and nothing of a failure's inside is sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openling.config.serve import LimitsConfig, TimeoutsConfig
from openling.serve.auth import Access, Keys
from openling.serve.problems import ApiError

log = logging.getLogger("openling.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_DISCARD_SECONDS = 2.0
CLOSE = {"Connection": "close"}
CLIENT_LEFT = 499  # as in nginx: only logs and metrics see it


class ClientGone(Exception):
    """The client closed its connection before the reply was complete."""


@dataclass(frozen=True)
class Paths:
    """Which paths need no key, which need the admin key; all others need an API key."""

    open: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()
    admin_prefixes: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()  # of routes whose path ends in a name, the admin's among them
    known: frozenset[str] = frozenset()
    binary: frozenset[str] = frozenset()

    def access(self, path: str) -> Access:
        """What a path asks for."""
        if path in self.admin or path.startswith(self.admin_prefixes):
            return "admin"
        return "open" if path in self.open else "api"

    def label(self, path: str) -> str:
        """A path as metrics and logs name it: what a client made up is not repeated."""
        prefix = next((p for p in self.prefixes if path.startswith(p)), None)
        return path if path in self.known else f"{prefix}*" if prefix else "other"


@dataclass
class _Exchange:
    """One request and how far its answer is."""

    id: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0


class Guard:
    """The outermost layer of the application. `observe(route, status, seconds)` is told of every answer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        paths: Paths,
        limits: LimitsConfig,
        timeouts: TimeoutsConfig,
        local_only: bool,
        observe: Callable[[str, int, float], None],
        refuse: Callable[[str], ApiError | None],
    ) -> None:
        self._app, self._keys, self._paths = app, keys, paths
        self._limits, self._timeouts, self._local_only = limits, timeouts, local_only
        self._observe, self._refuse = observe, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        exchange = _Exchange(given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}", scope["path"])
        scope.setdefault("state", {})["request_id"] = exchange.id
        sender = self._stamped(send, exchange)
        try:
            await self._admit(scope, headers)
            await self._app(scope, self._bounded(receive, exchange.path), sender)
        except ClientGone:
            exchange.status = CLIENT_LEFT
        except ApiError as error:
            if error.status == 413:
                await self._discard(receive)
            await self._answer(error, exchange, sender)
        except HTTPException as error:
            await self._answer(_routing_error(error, scope), exchange, sender)
        except Exception as error:
            log_failure(error, exchange.id)
            await self._answer(ApiError(500, "something went wrong in the server", code="internal"), exchange, sender)
        finally:
            seconds = time.monotonic() - exchange.started
            label = self._paths.label(exchange.path)
            self._observe(label, exchange.status, seconds)
            log.info("%s %s %d %.3fs %s", scope["method"], label, exchange.status, seconds, exchange.id)

    async def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        """Everything that is decided from the request line and the headers."""
        path = scope["path"]
        if self._local_only and not _LOCAL_HOST.fullmatch(headers.get("host", "")):
            # A web page that rebinds its name to this machine could otherwise use a server that has no key.
            raise ApiError(403, "this server answers to localhost only", code="host_refused")
        self._check_framing(scope, headers)
        scope["state"]["caller"] = self._keys.check(headers, self._paths.access(path))
        refusal = self._refuse(path)
        if refusal is not None:
            raise refusal
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most_bytes(path):
            raise self._too_large(path)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        wanted = "application/octet-stream" if path in self._paths.binary else "application/json"
        if scope["method"] == "POST" and kind != wanted and (length != "0" or "transfer-encoding" in headers):
            # Other types would reach us from foreign web pages without the browser asking first.
            raise ApiError(415, f"send Content-Type: {wanted}", code="unsupported_media_type")

    def _check_framing(self, scope: Scope, headers: dict[str, str]) -> None:
        """What HTTP's parser lets pass."""
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])
        if size > self._limits.header_bytes:  # the parser counts only what arrives in pieces
            raise ApiError(
                400, f"the headers are larger than {self._limits.header_bytes} bytes", code="invalid_http", headers=CLOSE
            )
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy in front may have believed the other one, and what is left of the body would be the next request.
            raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other", code="invalid_http", headers=CLOSE)
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "send the body without Content-Encoding", code="unsupported_media_type", headers=CLOSE)

    def _bounded(self, receive: Receive, path: str) -> Receive:
        """`receive` with the body's size and time limited."""
        deadline = asyncio.get_running_loop().time() + self._timeouts.body
        size, complete = 0, False

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time", code="timeout", headers=CLOSE) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            if size > self._most_bytes(path):
                raise self._too_large(path)
            complete = not message.get("more_body", False)
            return message

        return bounded

    async def _discard(self, receive: Receive) -> None:
        """Read on for a moment: a client that is still sending would see a broken connection instead of the answer."""
        most = 2 * self._limits.body_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(min(self._timeouts.body, _DISCARD_SECONDS)):
                while most > 0:
                    message = await receive()
                    most -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _most_bytes(self, path: str) -> int:
        return self._limits.weight_bytes if path in self._paths.binary else self._limits.body_bytes

    def _too_large(self, path: str) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most_bytes(path)} bytes",
            code="request_too_large",
            headers=CLOSE,
        )

    def _stamped(self, send: Send, exchange: _Exchange) -> Send:
        """`send` with the request id among the headers, remembering the status."""

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                own = [(b"x-request-id", exchange.id.encode()), (b"x-content-type-options", b"nosniff")]
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in present)]
            await send(message)

        return stamped

    async def _answer(self, error: ApiError, exchange: _Exchange, send: Send) -> None:
        """An error as the whole answer; after the answer has begun there is nothing to add, and the connection is cut."""
        if exchange.status:
            return
        body = error_body(error, exchange.path, exchange.id)
        headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def error_body(error: ApiError, path: str, request_id: str) -> bytes:
    """The error in the dialect of the path's clients."""
    shape = error.anthropic(request_id) if path.startswith("/v1/messages") else error.openai()
    return json.dumps(shape, ensure_ascii=False).encode("utf-8", "replace")


def _routing_error(error: HTTPException, scope: Scope) -> ApiError:
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"this route takes {allowed}, not {scope['method']}"
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    return ApiError(error.status_code, str(error.detail))


def log_failure(error: Exception, request_id: str) -> None:
    """Where it happened and of what kind. Not the message: it may repeat what a client sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s in request %s\n%s", type(error).__name__, request_id, frames)
