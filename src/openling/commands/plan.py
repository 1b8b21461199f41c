"""`openling plan`: a migration from config.json alone; with --world a training job on a mesh of GPUs; with --budget a size.

What each prints is computed elsewhere: `migrate.plan`, `plan.job`, `plan.scaling`.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.console import Console

from openling.commands.gpus import add_rates, planned_device, planned_reserve
from openling.errors import UserError
from openling.migrate import plan as migration
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.plan.activations import POLICIES
from openling.plan.devices import DEVICES, Device
from openling.plan.mesh import GATHERS, OPTIMIZERS

if TYPE_CHECKING:
    from openling.plan.job import TrainingPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `openling plan`."""
    migration.add_arguments(parser, model_optional=True)
    job = parser.add_argument_group("training job on many GPUs (with --world; MODEL as it is)")
    job.add_argument("--world", type=int, metavar="N", help="GPUs in all")
    job.add_argument(
        "--mesh", default="auto", metavar="AXES", help="shard=256,expert=64,pipeline=8; or auto, the default: search"
    )
    job.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens per optimiser step, all ranks (default: 32,768 per GPU)"
    )
    job.add_argument("--device", default="h100", help=f"kind of GPU: {', '.join(DEVICES)} (default: h100)")
    job.add_argument("--recompute", choices=("auto", *POLICIES), default="auto", help="what backward makes again")
    job.add_argument("--gather", choices=("auto", *GATHERS), default="auto", help="how long gathered weights stay")
    job.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="whose states are kept")
    job.add_argument("--reserve", type=float, metavar="GIB", help="memory left for what is not counted")
    job.add_argument("--no-placement", action="store_true", help="leave out the table of tensors")
    add_rates(parser)
    budget = parser.add_argument_group("size of a new model")
    budget.add_argument("--budget", type=float, metavar="FLOPS", help="what the scaling laws advise for so many training FLOPs")


def run(args: argparse.Namespace) -> int:
    """Print one of the plans; the exit code is 0, mistakes are raised as UserError."""
    if args.budget is not None:
        return _budget(args)
    if args.model is None:
        raise UserError("no model was named", where="MODEL", expected="a checkpoint folder, config.json or preset; or --budget")
    if args.world is not None:
        return _job(args)
    if args.mesh != "auto" or args.batch_tokens is not None:
        raise UserError(
            "a mesh needs its number of GPUs", where="--world", expected="--world N", next="openling plan MODEL --world 2048"
        )
    return migration.run(args)


def _job(args: argparse.Namespace) -> int:
    from openling.plan.show_job import show_job

    given = {name: getattr(args, name) for name in ("dp", "tp", "pp", "ep") if getattr(args, name) != 1}
    if given:
        raise UserError("with --world the axes stand in --mesh", where=", ".join("--" + n for n in given), expected="--mesh")
    if args.source is not None:
        raise UserError("a training job has no teacher to compare with", where="--source", expected="no --source with --world")
    gpu, reserve = planned_device(args, args.device, "--device"), planned_reserve(args)
    config = read_config(migration.load_config(args.model))
    searching = f"Searching meshes of {args.world:,} GPUs ..." if args.mesh == "auto" else "Planning ..."
    with Console(stderr=True).status(searching):  # on a terminal only
        plan = _plan(args, config, gpu, reserve)
    if args.json:
        print(json.dumps({"model": args.model, **plan.as_dict()}, indent=2))
    else:
        show_job(plan, args.model, placement=not args.no_placement)
    return 0


def _plan(args: argparse.Namespace, config: ModelConfig, gpu: Device, reserve: int | None) -> TrainingPlan:
    from openling.plan.job import plan_training

    return plan_training(
        config,
        world=args.world,
        mesh=args.mesh,
        seq_len=args.seq_len,
        batch_tokens=args.batch_tokens,
        micro_batch=args.micro_batch,
        device=gpu,
        recompute=None if args.recompute == "auto" else args.recompute,
        gather=None if args.gather == "auto" else args.gather,
        optimizer=args.optimizer,
        reserve=reserve,
    )


def _budget(args: argparse.Namespace) -> int:
    from openling.plan.scaling import plan_budget
    from openling.plan.show_budget import show_budget

    if args.model is not None:
        raise UserError("a budget chooses its own model", where="MODEL", value=args.model, expected="--budget without MODEL")
    job = {"--world": args.world, "--mesh": None if args.mesh == "auto" else args.mesh, "--batch-tokens": args.batch_tokens}
    if flag := next((flag for flag, value in job.items() if value is not None), None):
        raise UserError(
            "a budget advises a model, whatever trains it", where=flag, value=job[flag], expected="--budget without it",
            next=f"openling plan MODEL --world {args.world or 'N'} plans a job, with a config.json of the shape that is advised",
        )  # fmt: skip
    moe, dense = plan_budget(args.budget, "moe"), plan_budget(args.budget, "dense")
    if args.json:
        print(json.dumps({"moe": moe.as_dict(), "dense": dense.as_dict()}, indent=2))
    else:
        show_budget(moe, dense)
    return 0
