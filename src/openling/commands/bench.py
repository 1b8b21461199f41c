"""`openling bench`: what this machine's kernels reach, and what a server does under load."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling bench`."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    kernels = what.add_parser("kernels", help="every fast operation at the shapes of its goal", allow_abbrev=False)
    kernels.add_argument("--quick", action="store_true", help="a minute at most: shorter turns, fewer shapes")
    kernels.add_argument("--op", metavar="NAME", help="only operations with this in their name")
    kernels.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="results file (default: benchmarks/results/kernels/ in a source checkout, else here)",
    )
    serving = what.add_parser("serving", help="an OpenAI-compatible server under streaming load", allow_abbrev=False)
    serving.add_argument("--url", default="http://127.0.0.1:8000", help="the server; its key is read from OPENLING_API_KEY")
    serving.add_argument("--requests", type=int, default=100, metavar="N")
    serving.add_argument("--concurrency", type=int, metavar="N", help="requests at a time (default: all)")
    serving.add_argument("--rate", type=float, metavar="R", help="requests per second, Poisson (default: no waiting)")
    serving.add_argument("--input-len", type=int, default=128, metavar="N", help="random tokens of each prompt")
    serving.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens of each reply")
    serving.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    serving.add_argument("--seed", type=int, default=0)
    serving.add_argument("--json", type=Path, metavar="PATH", help="results file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; exit code 1 if a case or a request failed."""
    return _kernels(args) if args.what == "kernels" else _serving(args)


def _kernels(args: argparse.Namespace) -> int:
    from rich.console import Console

    from openling.bench.kernels import bench_kernels
    from openling.bench.table import WIDTH, RowTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    return bench_kernels(quick=args.quick, op=args.op, path=args.json, command=args.command, table=RowTable(console))


def _serving(args: argparse.Namespace) -> int:
    from openling.bench.serving import Load, bench_serving
    from openling.bench.stream_client import parse_server

    load = Load(
        requests=args.requests,
        concurrency=args.concurrency,
        rate=args.rate,
        input_len=args.input_len,
        output_len=args.output_len,
        shared_prefix=args.shared_prefix,
        seed=args.seed,
    )
    server = parse_server(args.url, os.environ.get("OPENLING_API_KEY"))
    return bench_serving(server, load, args.json, args.command)
