"""`openling bench`: what this machine's kernels reach, beside peers and limits measured in the same run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling bench`."""
    parser.add_argument("what", choices=["kernels"], help="kernels: every fast operation at the shapes of its goal")
    parser.add_argument("--quick", action="store_true", help="a minute at most: shorter turns, fewer shapes")
    parser.add_argument("--op", metavar="NAME", help="only operations with this in their name")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="results file (default: benchmarks/results/kernels/ in a source checkout, else here)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; exit code 1 if a case failed."""
    from rich.console import Console

    from openling.bench.kernels import bench_kernels
    from openling.bench.table import WIDTH, RowTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    return bench_kernels(quick=args.quick, op=args.op, path=args.json, command=args.command, table=RowTable(console))
