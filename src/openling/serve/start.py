"""From a checkpoint folder to a server: load, build the engine, serve until a signal."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from openling.config.serve import ServeConfig
from openling.data.chat import template_source
from openling.errors import UserError
from openling.model.device import pick_device
from openling.ops.pick import kernels_reason
from openling.serve.async_engine import AsyncEngine
from openling.serve.auth import Keys, is_loopback
from openling.serve.engine import Engine
from openling.serve.engine_config import EngineConfig
from openling.serve.parsers import choose
from openling.serve.server import Server, build_app
from openling.serve.service import Service
from openling.serve.text import ModelText
from openling.weights.dtype import load_computed
from openling.weights.folder import Loaded

log = logging.getLogger("openling")


def serve(
    folder: Path, *, sock: socket.socket, device: str, dtype: str, engine: EngineConfig, config: ServeConfig, keys: Keys
) -> int:
    """Serve `folder` on a bound socket until SIGTERM or SIGINT; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    chosen = pick_device(device)
    loaded, computed = load_computed(folder, dtype=dtype, device=chosen)
    longest = loaded.config.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > longest:
        raise UserError(
            "the model was not made for such a context",
            where="--max-model-len",
            value=engine.max_model_len,
            expected=f"at most {longest}",
        )
    print(f"Ops: {kernels_reason(chosen)}. Weights: {computed}.", file=sys.stderr)
    return asyncio.run(_serve(loaded, sock, engine, config, keys))


async def _serve(loaded: Loaded, sock: socket.socket, engine_config: EngineConfig, config: ServeConfig, keys: Keys) -> int:
    service = build_service(loaded, engine_config, config)
    host, port = sock.getsockname()[:2]
    app = build_app(service, keys, local_only=is_loopback(host) and not keys.required)
    server = Server(service, app, [sock])
    stop = server.stop_on_signals()
    service.engine.start()
    await service.stats()
    gc.freeze()  # what is here now stays: collections during large requests need not look through it
    running = asyncio.create_task(server.run(stop))
    await server.listening()
    shown = f"[{host}]" if ":" in host else host
    lock = "API key needed" if keys.required else "no API key"
    print(f"Serving {service.model_id}, context {service.max_model_len}, at http://{shown}:{port}/ ({lock}).", file=sys.stderr)
    await asyncio.to_thread(service.text.warm_up)
    await running
    return 0


def build_service(loaded: Loaded, engine_config: EngineConfig, config: ServeConfig) -> Service:
    """The service around a loaded model, its engine not yet started. Raises UserError without a fast tokenizer or what drafts."""
    if engine_config.drafts and not loaded.model.model.mtp_layers():
        raise UserError("this model has no MTP layer to draft with", where="--drafts", value=engine_config.drafts, expected="0")
    template = getattr(loaded.tokenizer, "chat_template", None)
    source = template_source(loaded.tokenizer) if template is not None else None
    formats = choose(source, tool_parser=config.tool_parser, reasoning_parser=config.reasoning_parser)
    text = ModelText(loaded.tokenizer, loaded.config.vocab_size, formats)
    # The engine's queue is bounded by the server's limits, which can say per key who is to wait.
    limits = config.limits
    bounded = replace(engine_config, max_waiting=limits.replies, max_waiting_tokens=limits.prompt_tokens)
    engine = Engine(loaded.model, loaded.tokenizer, bounded)
    began = time.monotonic()
    captured = engine.warm_up()
    if captured:
        log.info("%d CUDA graphs captured in %.1f s", captured, time.monotonic() - began)
    return Service(
        engine=AsyncEngine(engine),
        text=text,
        config=config,
        model_id=config.model_id or loaded.folder.resolve().name,
        max_model_len=engine.max_model_len,
        weight_version=engine.weight_version,
    )
