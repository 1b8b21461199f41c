"""`openling plan`: a migration from config.json alone; with --world a training job on a mesh of GPUs; with --budget a size.

What each prints is computed elsewhere: `migrate.plan`, `plan.job`, `plan.scaling`.
"""

from __future__ import annotations

import argparse
import json

from openling.errors import UserError
from openling.migrate import plan as migration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `openling plan`."""
    migration.add_arguments(parser, model_optional=True)
    budget = parser.add_argument_group("size of a new model")
    budget.add_argument("--budget", type=float, metavar="FLOPS", help="what the scaling laws advise for so many training FLOPs")


def run(args: argparse.Namespace) -> int:
    """Print one of the plans; the exit code is 0, mistakes are raised as UserError."""
    if args.budget is not None:
        return _budget(args)
    if args.model is None:
        raise UserError("no model was named", where="MODEL", expected="a checkpoint folder, config.json or preset; or --budget")
    return migration.run(args)


def _budget(args: argparse.Namespace) -> int:
    from openling.plan.scaling import plan_budget
    from openling.plan.show_budget import show_budget

    if args.model is not None:
        raise UserError("a budget chooses its own model", where="MODEL", value=args.model, expected="--budget without MODEL")
    moe, dense = plan_budget(args.budget, "moe"), plan_budget(args.budget, "dense")
    if args.json:
        print(json.dumps({"moe": moe.as_dict(), "dense": dense.as_dict()}, indent=2))
    else:
        show_budget(moe, dense)
    return 0
