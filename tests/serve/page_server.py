"""A server that plays back what a test wrote, for what a real one does not do when asked: refuse, hang, break off, call tools."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from openling.serve.web import PAGE_HEADERS, page_files

# A step of a streamed reply: a delta; a threading.Event to wait for; bytes as they are; or an exception that breaks off.
Step = dict[str, Any] | threading.Event | bytes | type[Exception]


class Script:
    """The answers to come, in turn; the last one repeats. `bodies`: what was asked; `gone`: set when a client left."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], Sequence[Step]]] = []
        self.models: tuple[int, Any] = (200, {"data": [{"id": "tests/ring-nano", "max_model_len": 8192}]})
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.gone = threading.Event()

    def stream(self, *steps: Step) -> None:
        """Answer with a stream."""
        self.answers.append((200, {}, steps))

    def say(self, text: str) -> None:
        """Answer with a text, in pieces of three characters."""
        self.stream(*({"content": text[i : i + 3]} for i in range(0, len(text), 3)))

    def refuse(self, status: int, message: str = "no", **headers: str) -> None:
        """Answer with an error."""
        error = json.dumps({"error": {"message": message}}).encode()
        self.answers.append((status, {name.replace("_", "-"): value for name, value in headers.items()}, [error]))


@contextmanager
def page_server() -> Iterator[tuple[str, Script]]:
    """The address of a running server, and its script."""
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            file = page_files().get(self.path)
            if file is not None:
                self.answer(200, file.content, {"Content-Type": file.media_type} | PAGE_HEADERS)
            elif self.path == "/v1/models":
                script.keys.append(self.headers["Authorization"])
                status, body = script.models
                self.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})
            else:
                self.answer(404, b"{}", {})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            script.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            script.keys.append(self.headers["Authorization"])
            status, headers, steps = script.answers[0] if len(script.answers) == 1 else script.answers.pop(0)
            if status != 200:
                self.answer(status, steps[0], headers)  # type: ignore[arg-type]
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.play(steps)
            except (BrokenPipeError, ConnectionResetError):
                script.gone.set()

        def play(self, steps: Sequence[Step]) -> None:
            tokens = 0
            for step in steps:
                if isinstance(step, threading.Event):
                    while not step.wait(0.05):
                        self.wfile.write(b": still here\n\n")  # fails when the client is gone
                elif isinstance(step, bytes):
                    self.wfile.write(step)
                elif isinstance(step, dict):
                    tokens += 1
                    self.event({"choices": [{"index": 0, "delta": step, "finish_reason": None}]}, tokens)
                else:
                    return
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, tokens)
            self.wfile.write(b"data: [DONE]\n\n")

        def event(self, chunk: dict[str, Any], tokens: int) -> None:
            usage = {"prompt_tokens": 1204, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 1024}}
            self.wfile.write(b"data: " + json.dumps(chunk | {"usage": usage}).encode() + b"\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
