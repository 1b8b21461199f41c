"""`openling verify SOURCE OUT`: re-check a finished conversion; exit code 1 where something is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

from openling.commands.migrate import open_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling verify`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder that was converted (only read)")
    parser.add_argument("out", type=Path, metavar="OUT", help="what `openling convert` or `openling migrate` wrote")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line per check; 0 where nothing is wrong."""
    from openling.migrate.verify import as_json, verify

    checks = verify(args.source, args.out)
    if args.json:
        print(as_json(checks))
    else:
        console = open_console()
        width = max(len(check.name) for check in checks)
        for check in checks:
            console.print(
                f"{check.outcome:<8} {check.name:<{width}}  {check.found}", highlight=False, markup=False, soft_wrap=True
            )
    return int(any(check.outcome == "wrong" for check in checks))
