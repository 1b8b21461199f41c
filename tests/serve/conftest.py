"""Servers for all tests of a process; each starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from live_server import Live
    from server_process import Served

    from openling.serve.engine import Engine


@pytest.fixture(scope="session")
def nano_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`openling serve` on the nano model, with an API key."""
    from server_process import API_KEY, served_nano

    with served_nano(tmp_path_factory.mktemp("served") / "nano", key=API_KEY) as server:
        yield server


@pytest.fixture(scope="session")
def tiny() -> Iterator[Live]:
    """A tiny model of bytes, without keys."""
    from live_server import live

    with live() as server:
        yield server


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The nano model in this process: a template, tools, grammars."""
    from live_server import live

    from openling.bench.nano import write_nano
    from openling.config.serve import ServeConfig
    from openling.serve.engine_config import EngineConfig
    from openling.serve.start import build_service
    from openling.weights.folder import load

    loaded = load(write_nano(tmp_path_factory.mktemp("model") / "nano"))
    sizes = {"max_running": 8, "step_tokens": 256, "pages": 200, "slots": 32, "max_model_len": 1024}
    with live(build_service(loaded, EngineConfig(**sizes), ServeConfig(model_id="nano"))) as server:
        yield server


@pytest.fixture(scope="session")
def scripted(nano: Live) -> Iterator[Live]:
    """A server with nano's tokenizer and template whose engine says what a test wants."""
    from live_server import live
    from scripted_engine import says, scripted_service

    service = scripted_service(says("ok"))
    service.text = nano.service.text
    service.close = lambda: None
    with live(service) as server:
        yield server


@pytest.fixture(scope="session")
def compiler(nano: Live) -> Engine:
    """An engine that compiles grammars."""
    return nano.service.engine.engine
