"""An engine whose timing and failures a test decides; for what a real one would do too fast or never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from live_server import byte_tokenizer

from openling.config.serve import LimitsConfig, ServeConfig, TimeoutsConfig
from openling.serve.engine import Engine
from openling.serve.parsers import ReplyFormat
from openling.serve.service import Service
from openling.serve.text import ModelText
from openling.serve.types import EngineStats, Output, Request, TokenLogprob


class ScriptedEngine:
    """Plays `script(request)`; remembers requests, and which replies were closed before their end.

    engine: compiles grammars.
    """

    def __init__(self, script: Callable[[Request], AsyncIterator[Output]], engine: Engine | None = None) -> None:
        self.script, self.engine, self.healthy = script, engine, True
        self.requests: list[Request] = []
        self.running = 0
        self.paused, self.paused_seconds = False, 0.0
        self.left: list[str] = []

    def start(self) -> None:
        pass

    async def stop(self, drain_seconds: float = 0.0) -> None:
        self.healthy = False

    async def call(self, function):
        return function(self)

    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, weight_version="7")

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        self.requests.append(request)
        self.running += 1
        done = False
        try:
            async for output in self.script(request):
                yield output
                done = output.finish_reason is not None
        finally:
            self.running -= 1
            if not done:
                self.left.append(request.id)


def piece(request: Request, text: str, end: str | None = None, **changes) -> Output:
    """An output of one token per character, with log-probabilities where they are asked for."""
    ids = [ord(c) for c in text]
    if request.params.logprobs is not None:
        changes |= {"logprobs": [TokenLogprob(i, -1.0, -1.0) for i in ids]}
    counts = {"prompt_tokens": len(request.prompt_token_ids), "completion_tokens": len(ids), "weight_version": "7"}
    return Output(request.id, ids, text, finish_reason=end, **(counts | changes))


def says(*pieces: str, pause: float = 0.0):
    """A script: these texts, then the end."""

    async def script(request):
        for text in pieces:
            await asyncio.sleep(pause)
            yield piece(request, text)
        yield piece(request, "", "stop")

    return script


async def hangs(request):
    """A script: one piece, then nothing for a minute."""
    yield piece(request, "x")
    await asyncio.sleep(60)


async def silent(request):
    """A script: nothing for a minute."""
    await asyncio.sleep(60)
    yield piece(request, "", "stop")


def scripted_service(script, *, limits=None, timeouts=None) -> Service:
    config = ServeConfig(
        limits=LimitsConfig(**(limits or {})), timeouts=TimeoutsConfig(**({"drain": 0.2, "idle": 1} | (timeouts or {})))
    )
    text = ModelText(byte_tokenizer(), 258, ReplyFormat(None, False))
    return Service(ScriptedEngine(script), text, config, "tiny", 1024)
