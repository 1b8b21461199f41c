"""The application: routes, who may use them, and the server process around it with its timeouts and its way of stopping."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from openling.errors import UserError
from openling.serve import admin_routes as admin
from openling.serve import anthropic_routes, basic_routes, chat, completions, generate_route, protocol_admin
from openling.serve.auth import Access, Keys
from openling.serve.guard import Guard, Paths
from openling.serve.openapi import document
from openling.serve.problems import ApiError, unavailable
from openling.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from openling.serve.protocol_anthropic import CountRequest, MessagesRequest
from openling.serve.service import Service, json_response
from openling.serve.web import PAGE_HEADERS, page_files

Handler = Callable[[Service, HttpRequest], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Endpoint:
    """One route. drains: answered while the server is stopping; binary: takes bytes; streams: answers events where asked to."""

    path: str
    method: str
    handler: Handler
    access: Access = "api"
    drains: bool = False
    binary: bool = False
    body: type[BaseModel] | None = None
    streams: bool = False
    answers: str = "application/json"


def endpoints() -> list[Endpoint]:
    """Every route but the page's files."""
    messages = "/v1/messages"
    return [
        Endpoint("/health", "GET", basic_routes.health, "open", drains=True),
        Endpoint("/ready", "GET", basic_routes.ready, drains=True),
        Endpoint("/metrics", "GET", basic_routes.metrics, drains=True, answers="text/plain"),
        Endpoint("/version", "GET", basic_routes.version, drains=True),
        Endpoint("/openapi.json", "GET", openapi_document),
        Endpoint("/v1/models", "GET", basic_routes.models),
        Endpoint("/v1/models/{model:path}", "GET", basic_routes.model),
        Endpoint("/v1/chat/completions", "POST", chat.chat_completions, body=ChatRequest, streams=True),
        Endpoint("/v1/completions", "POST", completions.completions, body=CompletionRequest, streams=True),
        Endpoint(messages, "POST", anthropic_routes.messages, body=MessagesRequest, streams=True),
        Endpoint(f"{messages}/count_tokens", "POST", anthropic_routes.count_tokens, body=CountRequest),
        Endpoint("/tokenize", "POST", basic_routes.tokenize, body=TokenizeRequest),
        Endpoint("/detokenize", "POST", basic_routes.detokenize, body=DetokenizeRequest),
        Endpoint("/tokenizer_info", "GET", basic_routes.tokenizer_info),
        *admin_endpoints(),
    ]


async def openapi_document(service: Service, http: HttpRequest) -> Response:
    """GET /openapi.json: every route, what it takes and what it answers."""
    return json_response(document(endpoints()))


def admin_endpoints() -> list[Endpoint]:
    """The routes behind the admin key; names that RL tools know from SGLang stand beside ours."""
    named: list[tuple[str, Handler, type[BaseModel], tuple[str, ...]]] = [
        ("/generate", generate_route.generate, protocol_admin.GenerateRequest, ()),
        ("/pause", admin.pause, protocol_admin.PauseRequest, ("/pause_generation",)),
        ("/resume", admin.resume, protocol_admin.Empty, ("/continue_generation",)),
        ("/abort", admin.abort, protocol_admin.AbortRequest, ("/abort_request",)),
        ("/update_weights", admin.update_weights, protocol_admin.UpdateRequest, ("/update_weights_from_disk",)),
        ("/update_weights/begin", admin.begin_update, protocol_admin.BeginRequest, ()),
        ("/update_weights/commit", admin.commit_update, protocol_admin.CommitRequest, ()),
        ("/flush_cache", admin.flush_cache, protocol_admin.Empty, ()),
        ("/release_memory", admin.release_memory, protocol_admin.Empty, ("/release_memory_occupation",)),
        ("/resume_memory", admin.resume_memory, protocol_admin.Empty, ("/resume_memory_occupation",)),
    ]
    found = [
        Endpoint(path, "POST", handler, "admin", body=body, streams=path == "/generate")
        for name, handler, body, others in named
        for path in (name, *others)
    ]
    found.append(Endpoint("/flush_cache", "GET", admin.flush_cache, "admin"))
    found.append(Endpoint("/update_weights/stream", "POST", admin.stream_update, "admin", binary=True))
    found.append(Endpoint("/weights/checksum", "GET", admin.checksum, "admin"))
    found.append(Endpoint("/weights/{name:path}", "GET", admin.weight, "admin", answers="application/octet-stream"))
    return found


def build_app(service: Service, keys: Keys, *, local_only: bool = False) -> ASGIApp:
    """The ASGI application. local_only: answer only requests whose Host is this machine's own name."""
    table = endpoints()
    page = {path: Response(file.content, media_type=file.media_type, headers=PAGE_HEADERS) for path, file in page_files().items()}
    by_path: dict[str, dict[str, Handler]] = {}
    for entry in table:
        by_path.setdefault(entry.path, {})[entry.method] = entry.handler
    routes = [Route(path, _endpoint(service, handlers), methods=list(handlers)) for path, handlers in by_path.items()]
    routes += [Route(path, partial(_file, file), methods=["GET"]) for path, file in page.items()]
    router = Router(routes, redirect_slashes=False, default=_no_route)

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = routed  # makes the router raise its errors instead of answering them
        await router(scope, receive, send)

    drains = {entry.path for entry in table if entry.drains}

    def refuse(path: str) -> ApiError | None:
        return unavailable("the server is stopping") if service.draining and path not in drains else None

    return Guard(
        routed,
        keys=keys,
        paths=_paths(table, page),
        limits=service.config.limits,
        timeouts=service.config.timeouts,
        local_only=local_only,
        observe=service.metrics.answered,
        refuse=refuse,
    )


def _paths(table: list[Endpoint], page: dict[str, Response]) -> Paths:
    open_paths = {entry.path for entry in table if entry.access == "open"} | set(page)
    admin_paths = {entry.path for entry in table if entry.access == "admin" and "{" not in entry.path}
    prefixes = {entry.path.partition("{")[0]: entry.access for entry in table if "{" in entry.path}
    admin_prefixes = sorted(prefix for prefix, access in prefixes.items() if access == "admin")
    known = {entry.path for entry in table} | set(page)
    binary = {entry.path for entry in table if entry.binary}
    return Paths(
        open=frozenset(open_paths),
        admin=frozenset(admin_paths),
        admin_prefixes=tuple(admin_prefixes),
        prefixes=tuple(sorted(prefixes)),
        known=frozenset(known),
        binary=frozenset(binary),
    )


def _endpoint(service: Service, handlers: dict[str, Handler]) -> Callable[[HttpRequest], Awaitable[Any]]:
    async def endpoint(http: HttpRequest) -> ASGIApp:
        method = "GET" if http.method == "HEAD" else http.method
        return await handlers[method](service, http)

    return endpoint


async def _file(file: Response, http: HttpRequest) -> Response:
    return file


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, "there is no such route; GET /openapi.json lists them", code="not_found")


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for slow headers and holds a bounded number of connections."""

    header_seconds = 10.0
    most_connections = 4096
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept a connection, or close it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.close()
            return
        self._deadline = self.loop.call_later(self.header_seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        """A request's headers must be whole within `header_seconds` of its first byte."""
        cycle = self.cycle
        if self._deadline is None and (cycle is None or cycle.response_complete):
            self._deadline = self.loop.call_later(self.header_seconds, self._give_up)
        super().data_received(data)
        if self.cycle is not cycle:
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, or has headers beyond the bound, is answered in the API's shape like everything else."""
        body = b'{"error":{"message":"this is not a valid HTTP/1.1 request, or its headers are too large",'
        body += b'"type":"invalid_request_error","param":null,"code":"invalid_http"}}'
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)
            self.transport.close()

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server:
    """uvicorn, bounded and drained: SIGTERM makes /ready say 503, lets replies finish until the deadline, then ends them."""

    def __init__(self, service: Service, app: ASGIApp, sockets: list[socket.socket]) -> None:
        limits, timeouts = service.config.limits, service.config.timeouts
        attributes = {"header_seconds": timeouts.headers, "most_connections": limits.connections}
        self._config = uvicorn.Config(
            app,
            http=type("_Protocol", (GuardedProtocol,), attributes),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=limits.header_bytes,
            timeout_keep_alive=max(1, round(timeouts.idle)),
            timeout_graceful_shutdown=1,
        )
        self._service, self._sockets = service, sockets
        self.hurry = asyncio.Event()
        self.uvicorn = _Quiet(self._config)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain."""
        serving = asyncio.create_task(self.uvicorn.serve(sockets=self._sockets))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await self.drain()
        self.uvicorn.should_exit = True
        await serving
        stopping.cancel()

    async def listening(self) -> None:
        """Return once connections are accepted, or the server has ended."""
        while not self.uvicorn.started and not self.uvicorn.should_exit:
            await asyncio.sleep(0.005)

    def stop_on_signals(self) -> asyncio.Event:
        """An event that SIGTERM and SIGINT set; a second signal ends the drain."""
        stop = asyncio.Event()

        def signalled() -> None:
            if stop.is_set():
                self.hurry.set()
            stop.set()

        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, signalled)
        return stop

    async def drain(self) -> None:
        """Take nothing new, wait for what runs, abort what is left at the deadline."""
        service = self._service
        service.draining = True
        finished = asyncio.create_task(_until_idle(service))
        hurried = asyncio.create_task(self.hurry.wait())
        await asyncio.wait({finished, hurried}, timeout=service.config.timeouts.drain, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        hurried.cancel()
        await service.engine.stop(0)
        service.close()


class _Quiet(uvicorn.Server):
    """Signals are `Server`'s."""

    def capture_signals(self) -> Any:
        """Leave the handlers as they are."""
        return nullcontext()


async def _until_idle(service: Service) -> None:
    while service.admission.total.replies:
        await asyncio.sleep(0.02)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: nobody connects before the model is loaded. Port 0 takes a free one."""
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((bare, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(
            "cannot listen there", where=f"--host {host} --port {port}", value=error, next="--port 0 takes a free port"
        ) from error
    return sock
