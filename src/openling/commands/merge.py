"""`openling merge`: checkpoints of one run, or checkpoint folders, to their weighted mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from openling.errors import UserError

EXAMPLES = """examples:
  openling merge runs/mine/stages/cpt OUT --last 8 --weights 1-sqrt   # unrounded weights of a training run
  openling merge A B C OUT --weights 0.2,0.3,0.5                      # folders, oldest first
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling merge`."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="a stage's folder of a run, or checkpoint folders"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new checkpoint folder")
    parser.add_argument(
        "--weights", default="mean", metavar="HOW", help="mean (default), 1-sqrt, cosine, ema:ALPHA, or numbers, oldest first"
    )
    parser.add_argument("--last", type=int, metavar="N", help="of a run: the last N checkpoints (default: all that it kept)")
    parser.add_argument("--steps", metavar="N,N,...", help="of a run: the checkpoints of these steps")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="of a run: where tensors that it did not train come from")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of a run's merged weights")


def run(args: argparse.Namespace) -> int:
    """Merge; exit code 0."""
    from openling.weights.merge import merge_folders

    if (args.sources[0] / "checkpoints").is_dir():
        if len(args.sources) > 1:
            raise UserError("one run at a time", where="SOURCE", value=str(args.sources[1]), expected="RUN/stages/NAME OUT")
        print(_merge_run(args))
        return 0
    if args.last is not None or args.steps is not None or args.base is not None:
        raise UserError(
            "--last, --steps and --base are for the folder of a training run", where=args.sources[0],
            expected="a folder with checkpoints/, RUN/stages/NAME",
        )  # fmt: skip
    print(merge_folders(args.sources, args.out, args.weights, provenance={"command": args.command}))
    return 0


def _merge_run(args: argparse.Namespace) -> Path:
    import json

    import torch

    from openling.model.families import read_config
    from openling.model.ling import Ling
    from openling.train.checkpoint import load_start
    from openling.train.wsm import chosen_checkpoints, merge_into
    from openling.weights.export import save
    from openling.weights.folder import load

    run: Path = args.sources[0]
    try:
        steps = [int(word) for word in args.steps.split(",")] if args.steps else []
    except ValueError as error:
        raise UserError("steps are whole numbers", where="--steps", value=args.steps, expected="100,200,300") from error
    sources = chosen_checkpoints(run, last=args.last, steps=steps)
    if args.base is not None:
        model = load(args.base, dtype=torch.float32).model
    else:
        if not (run / "config.json").exists():
            raise UserError("the run does not say of which model it is", where=run, next="--base FOLDER")
        trained = set(json.loads((run / "train.json").read_text())["parameters"])
        with torch.device("meta"):
            model = Ling(read_config(json.loads((run / "config.json").read_text()), where=run / "config.json"))
        if missing := sorted({name for name, _ in model.named_parameters()} - trained):
            raise UserError(
                "the run did not train every tensor", where=run, value=missing[0], next="--base FOLDER for the others"
            )
        model = model.to_empty(device="cpu")
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.word_embeddings.weight
        load_start(list(sources.values())[-1], model)
    about = merge_into(model, sources, args.weights)
    companions = run.parents[1] / "tokenizer"
    return save(
        model.eval(),
        args.out,
        dtype=getattr(torch, args.dtype),
        source=args.base,
        provenance=about | {"steps": max(sources), "command": args.command},
        companions=companions if companions.is_dir() else None,
    )
