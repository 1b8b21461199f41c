"""A checkpoint's chat template as a function: messages to text, in Jinja's sandbox; here, or in a process that can be stopped.

A template is code from a folder. The sandbox keeps it from the machine; only a process of its own keeps it from using up time and
memory, so a server renders with `IsolatedTemplate`. Imports no torch.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NoReturn, Protocol

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openling.errors import Failure, OpenlingError, UserError


@dataclass(frozen=True)
class Rendered:
    """Text, and which characters the assistant wrote: (start, end) of every `{% generation %}` block, in order."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may take; time and memory hold in `IsolatedTemplate` only."""

    output_chars: int = 8_000_000
    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    start_seconds: float = 20.0


class Template(Protocol):
    """What renders: `variables` are the template's globals (messages, tools, add_generation_prompt, bos_token, ...)."""

    source: str

    def render(self, variables: Mapping[str, Any], *, track: bool = False) -> Rendered:
        """The text, with the assistant's spans if `track`. Raises UserError where the template fails or refuses."""
        ...


@dataclass
class LocalTemplate:
    """Renders in this process."""

    source: str
    limits: TemplateLimits = field(default_factory=TemplateLimits)

    def render(self, variables: Mapping[str, Any], *, track: bool = False) -> Rendered:
        """See `Template.render`."""
        mark = f"\0{secrets.token_hex(16)}\0" if track else ""  # no message can hold it
        try:
            pieces, size = [], 0
            for piece in _compiled(self.source).generate(**variables, **{_Generation.MARK: mark}):
                pieces.append(piece)
                size += len(piece)
                if size > self.limits.output_chars:
                    raise UserError("the rendered chat is too long", expected=f"at most {self.limits.output_chars} characters")
        except UserError:
            raise
        except Exception as error:  # the boundary to code from a checkpoint, which may raise anything
            raise UserError("the chat template cannot render this", value=f"{type(error).__name__}: {error}"[:500]) from error
        return _without_marks("".join(pieces), mark)


class IsolatedTemplate:
    """Renders in a process without rights to much memory, which is ended and started anew when a rendering takes too long.

    Threads may share one; they take turns.
    """

    def __init__(self, source: str, limits: TemplateLimits | None = None) -> None:
        self.source = source
        self.limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def render(self, variables: Mapping[str, Any], *, track: bool = False) -> Rendered:
        """See `Template.render`; also UserError where time or memory runs out. Variables must be JSON."""
        line = json.dumps({"variables": dict(variables), "track": track}).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._ask(line, self.limits.seconds)
        if reply is None:
            raise UserError(
                "the chat template takes too much time or memory",
                expected=f"at most {self.limits.seconds:g} s and {self.limits.memory_bytes // 2**20} MiB",
            )
        if "error" in reply:
            raise UserError(reply["error"])
        return Rendered(reply["text"], tuple((start, end) for start, end in reply["spans"]))

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        command = [sys.executable, "-m", "openling.data.template"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        hello = {"source": self.source, "chars": self.limits.output_chars, "memory": self.limits.memory_bytes}
        if self._ask(json.dumps(hello).encode() + b"\n", self.limits.start_seconds) is None:
            raise Failure("the process that renders chat templates does not start", where=" ".join(command))

    def _stop(self) -> None:
        process, self._process, self._unread = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _ask(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """One line there and one back, or None (and no process any more) where it died or took too long."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Timer(seconds, process.kill)  # wakes the reads and writes below
        late.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            late.cancel()
        if not answer.endswith(b"\n"):
            self._stop()
            return None
        reply: dict[str, Any] = json.loads(answer)
        return reply


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, between marks."""

    tags = {"generation"}
    MARK = "openling_mark"

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.Name(self.MARK, "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, mark: str, caller: Callable[[], str]) -> str:
        return mark + caller() + mark


@cache
def builtin_template(name: Literal["ling", "ring"]) -> str:
    """The source of our own template for instant (ling) or thinking (ring) models."""
    return (files("openling.data") / "templates" / f"{name}.jinja").read_text().rstrip("\n")


@cache
def _compiled(source: str) -> jinja2.Template:
    """The template in the environment that `transformers` gives templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _without_marks(text: str, mark: str) -> Rendered:
    if not mark:
        return Rendered(text)
    pieces = text.split(mark)
    spans, length = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            spans.append((length, length + len(piece)))
        length += len(piece)
    return Rendered("".join(pieces), tuple(spans))


def _serve() -> None:
    """The other end of `IsolatedTemplate`: a line of JSON in, a line of JSON out, until the input ends."""
    hello = json.loads(sys.stdin.readline())
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (hello["memory"], hello["memory"]))
    template = LocalTemplate(hello["source"], TemplateLimits(output_chars=hello["chars"]))
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            rendered = template.render(request["variables"], track=request["track"])
            reply: dict[str, Any] = {"text": rendered.text, "spans": rendered.spans}
        except OpenlingError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
