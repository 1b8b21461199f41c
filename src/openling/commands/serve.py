"""`openling serve`: an OpenAI-compatible server for any checkpoint folder, or the command that starts a cluster's engine."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from openling.commands.complete import add_dtype
from openling.config.load import override
from openling.config.serve import ServeConfig
from openling.errors import UserError

if TYPE_CHECKING:
    from openling.serve.engine_config import EngineConfig

NEEDED = ("starlette", "uvicorn", "prometheus_client", "llguidance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling serve`; bounds and deadlines can be set too, as --section.field value."""
    parser.add_argument("model", type=Path, metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0 takes a free one)")
    parser.add_argument("--model-id", metavar="NAME", help="name that clients ask for (default: the folder's)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    add_dtype(parser)
    parser.add_argument("--max-model-len", type=int, metavar="N", help="context in tokens (default: the model's)")
    parser.add_argument("--max-running", type=int, default=64, metavar="N", help="replies computed at once (default 64)")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory for caches (default: what is free)")
    parser.add_argument("--drafts", type=int, default=0, metavar="K", help="tokens that the MTP layer drafts (default 0)")
    parser.add_argument("--deterministic", action="store_true", help="a reply does not depend on the requests around it")
    formats = "ling, ring, qwen, hermes, glm or none; auto (default): as its template shows"
    parser.add_argument("--tool-parser", default="auto", metavar="NAME", help=f"how the model writes tool calls: {formats}")
    parser.add_argument("--reasoning-parser", default="auto", metavar="NAME", help="think, none or auto (default)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="API keys, one per line (or OPENLING_API_KEY)")
    parser.add_argument("--admin-key-file", type=Path, metavar="FILE", help="the admin key (or OPENLING_ADMIN_KEY)")
    parser.add_argument(
        "--allow-public-without-key", action="store_true", help="listen beyond this machine although no API key is set"
    )
    parser.add_argument("--engine", choices=["openling", "sglang", "vllm"], default="openling", help="who serves")
    parser.add_argument("--tp", type=int, metavar="N", help="with sglang or vllm: GPUs to split the model over")
    parser.add_argument("--print-command", action="store_true", help="with sglang or vllm: print the command, do not run it")
    parser.epilog = "Bounds and deadlines: e.g. --limits.n 4, --timeouts.drain 120 (docs/api.md lists them)."
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; exit code 0."""
    if args.engine != "openling":
        return _cluster(args)
    for flag, given in (("--tp", args.tp is not None), ("--print-command", args.print_command)):
        if given:
            raise UserError(f"{flag} belongs to --engine sglang or vllm", where=flag, value="--engine openling")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "serving needs packages that are not installed", value=", ".join(missing), next="pip install 'openling[serve]'"
        )
    from openling.serve.auth import check_binding, read_keys
    from openling.serve.server import bind

    config = _config(args)
    engine = _engine(args)
    keys = read_keys(os.environ, args.api_key_file, args.admin_key_file)
    check_binding(args.host, keys, allow_public=args.allow_public_without_key)
    sock = bind(args.host, args.port)
    from openling.serve.start import serve

    return serve(args.model, sock=sock, device=args.device, dtype=args.dtype, engine=engine, config=config, keys=keys)


def _config(args: argparse.Namespace) -> ServeConfig:
    if args.model_id is not None and not (args.model_id.isprintable() and args.model_id.strip()):
        raise UserError(
            "this name cannot be asked for", where="--model-id", value=repr(args.model_id), expected="printable characters"
        )
    own = ServeConfig(model_id=args.model_id, tool_parser=args.tool_parser, reasoning_parser=args.reasoning_parser)
    return override(own, args.overrides, flags=args.flags)


def _engine(args: argparse.Namespace) -> EngineConfig:
    from openling.serve.engine_config import EngineConfig

    if args.memory_gib is not None and not args.memory_gib > 0:
        raise UserError("caches need memory", where="--memory-gib", value=args.memory_gib, expected="more than 0")
    try:
        return EngineConfig(
            max_running=args.max_running,
            max_model_len=args.max_model_len,
            memory_bytes=None if args.memory_gib is None else max(1, int(args.memory_gib * 2**30)),
            drafts=args.drafts,
            deterministic=args.deterministic,
        )
    except UserError as error:  # the setting as it was typed
        flag = f"--{error.parts['where']}".replace("_", "-")
        raise UserError(error.what, **(error.parts | {"where": flag})) from None


def _cluster(args: argparse.Namespace) -> int:
    from openling.serve.cluster import launch

    if args.overrides:
        raise UserError("bounds and deadlines are openling's own server's", value=args.overrides[0], next="--engine openling")
    return launch(
        args.engine,
        args.model,
        tp=args.tp,
        host=args.host,
        port=args.port,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        run=not args.print_command,
    )
