"""`openling train`: a recipe's stages, from random or given weights to checkpoint folders."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openling.commands import train_plan
from openling.errors import Failure, UserError, nearest

if TYPE_CHECKING:
    import torch

    from openling.config.recipe import RecipeConfig

EXAMPLES = """examples:
  openling train nano                                        # from nothing on a CPU, with text that comes with the install
  openling train mine.toml --out runs/mine --set train.lr=3e-4 --set stages.cpt.tokens=1e9
  openling train mine.toml --out runs/mine --resume
  openling train flash --dry-run                             # every setting, and what it costs
  openling train flash --dry-run --world 128                 # and what every rank of 128 would hold, send and compute
  torchrun --nproc-per-node 8 -m openling train mine.toml --out runs/mine --parallel.expert 8    # one machine's GPUs

Any setting of the recipe can be set, as --set section.field=value or --section.field value; stages by name.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling train`."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or one of nano, mini, flash, 1t")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="print every setting and the estimate, and stop")
    parser.add_argument("--quiet", action="store_true", help="no line per step")
    train_plan.add_arguments(parser)
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train; exit code 0, or 128 + the signal that stopped it."""
    from openling.config.recipe import read_recipe

    recipe = read_recipe(find_recipe(args.recipe), changes(args.set, args.overrides))
    out = args.out or Path("runs") / recipe.name
    if args.dry_run:
        from openling.train.estimate import estimate

        plans = train_plan.plan_stages(recipe, args)
        print(json.dumps(recipe.model_dump(mode="json"), indent=2))
        print(estimate(recipe, out))
        if plans:
            train_plan.show_plans(recipe, plans, placement=not args.no_placement)
        return 0
    if args.world is not None:
        raise UserError("ranks are planned, not started", where="--world", value=args.world, expected="--dry-run with it")
    from openling.model.device import pick_device
    from openling.parallel import world as ranks

    device = pick_device(args.device)
    if not ranks.started_by_torchrun():
        _train(recipe, args, out, device, speak=True)
        return 0
    world = ranks.join(device)
    with ranks.ending_together(world):
        _train(recipe, args, out, world.device, speak=world.main)
    return 0


def _train(recipe: RecipeConfig, args: argparse.Namespace, out: Path, device: torch.device, *, speak: bool) -> None:
    """The recipe's stages; a `Failure` with the signal's exit code where one stopped them."""
    from openling.commands.migrate import open_console
    from openling.ops.pick import kernels_reason
    from openling.parallel import world as ranks
    from openling.train.stages import Pipeline

    console = open_console(stderr=True)

    def say(text: str) -> None:
        if speak:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"Ops: {kernels_reason(device)}.")
    progress: Any = False if args.quiet else 0
    pipeline = Pipeline(recipe, out, device=device, command=args.command, say=say, progress=progress)
    outcome = pipeline.go(resume=args.resume)
    if outcome.stopped is not None:
        start = "by torchrun as before: " if ranks.started_by_torchrun() else ""
        again = f"{start}{args.command}{'' if args.resume else ' --resume'}"
        failure = Failure("stopped by a signal", where=f"step {outcome.stopped.steps}, which is in a checkpoint", next=again)
        failure.exit_code = 128 + (outcome.stopped.signal or 0)  # as a shell reports a process that died of it
        raise failure
    last = str(outcome.models[-1])
    say(f"\nCheckpoint: {last}\nTry:        openling generate {shlex.quote(last)} 'Once upon a time'")


def find_recipe(word: str) -> Path:
    """The file at that path, or the recipe of that name that comes with openling."""
    path = Path(word)
    if path.suffix == ".toml" or path.is_file():
        return path
    package = Path(__file__).resolve().parents[1]
    folders = [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]
    known = {p.stem: p for folder in folders for p in sorted(folder.glob("*.toml"))}
    if word not in known:
        expected = f"a TOML file, or {', '.join(known)}"
        raise UserError("there is no such recipe", value=word, expected=expected, nearest=nearest(word, known))
    return known[word]


def changes(pairs: list[str], overrides: list[str]) -> list[tuple[str, str]]:
    """(dotted name, text) of `--set a.b=value` and `--a.b value`, in this order."""
    found = []
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError("a setting needs a value", where="--set", value=pair, expected="--set section.field=value")
        found.append((name, text))
    rest = list(overrides)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if "." not in flag:
            close = nearest(flag, ["--set", "--out", "--resume", "--dry-run", "--device", "--quiet"])
            raise UserError("unknown argument", value=flag, expected="a flag of --help, or --section.field", nearest=close)
        if not equals:
            if not rest:
                raise UserError("this setting needs a value", where=flag, expected=f"{flag} VALUE")
            text = rest.pop(0)
        found.append((flag.removeprefix("--"), text))
    return found
