"""`openling merge`: checkpoints of one run, or checkpoint folders, to their weighted mean."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openling.errors import UserError

if TYPE_CHECKING:
    from openling.model.config import ModelConfig
    from openling.model.ling import Ling

# What --best measures on, in windows of at most this length.
EVALUATION_TOKENS, EVALUATION_LENGTH = 65536, 1024
# In which a stage's configuration may differ from that of --base: its own positions, special tokens, how the head is stored.
FREE_OF_BASE = {
    *("rope_theta", "rope_scaling", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
}

EXAMPLES = """examples:
  openling merge runs/mine/stages/cpt OUT --last 8 --weights 1-sqrt   # unrounded weights of a training run
  openling merge runs/mine/stages/mid OUT --best 8 --eval-text held-out.jsonl   # those with the lowest loss on a text
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
    how = "mean (default), linear, 1-sqrt, cosine, ema:ALPHA, or numbers, oldest first"
    parser.add_argument("--weights", default="mean", metavar="HOW", help=how)
    parser.add_argument("--last", type=int, metavar="N", help="of a run: the last N checkpoints (default: all that it kept)")
    parser.add_argument("--best", type=int, metavar="N", help="of a run: of those, the N with the lowest loss on --eval-text")
    parser.add_argument("--eval-text", metavar="TEXT", help="what --best measures on: a path, a built-in text, a corpus")
    parser.add_argument("--steps", metavar="N,N,...", help="of a run: the checkpoints of these steps, oldest first")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="of a run: where tensors that it did not train come from")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of a run's merged weights")


def run(args: argparse.Namespace) -> int:
    """Merge; exit code 0."""
    from openling.weights.merge import merge_folders

    if (args.sources[0] / "checkpoints").is_dir():
        if len(args.sources) > 1:
            raise UserError("one run at a time", where="SOURCE", value=str(args.sources[1]), expected="RUN/stages/NAME OUT")
        print(_merge_run(args))
        _tell_scaling(args.weights)
        return 0
    if stages := sorted(str(path.parent) for path in args.sources[0].glob("stages/*/checkpoints")):
        raise UserError(
            "this is a run of several stages, which are merged each by itself", where=args.sources[0],
            expected="RUN/stages/NAME", nearest=stages[-1],
        )  # fmt: skip
    if any(given is not None for given in (args.last, args.best, args.steps, args.base)):
        raise UserError(
            "--last, --best, --steps and --base are for the folder of a training run", where=args.sources[0],
            expected="a folder with checkpoints/, RUN/stages/NAME",
        )  # fmt: skip
    print(merge_folders(args.sources, args.out, args.weights, provenance={"command": args.command}))
    _tell_scaling(args.weights)
    return 0


def _tell_scaling(weighting: str) -> None:
    """That numbers were not taken as they stand, where they do not come to 1."""
    from openling.weights.merge import coefficients, given_numbers

    numbers = given_numbers(weighting)
    if numbers is not None and not math.isclose(sum(numbers), 1, rel_tol=1e-9):
        weights = ",".join(f"{c:.6g}" for c in coefficients(weighting, len(numbers)))
        print(f"weights {weighting} come to {sum(numbers):.6g}: scaled to come to 1, {weights}", file=sys.stderr)


def _merge_run(args: argparse.Namespace) -> Path:
    import torch

    from openling.train.checkpoint import load_start
    from openling.train.wsm import chosen_checkpoints, merge_into
    from openling.weights.export import save
    from openling.weights.folder import load_tokenizer

    run: Path = args.sources[0]
    if (args.best is None) != (args.eval_text is None) or (args.best is not None and args.best < 1):
        raise UserError(
            "--best is a number of checkpoints, at least 1, and --eval-text what they are measured on", where=run,
            value=f"--best {args.best}, --eval-text {args.eval_text}", expected="both or neither",
        )  # fmt: skip
    try:
        steps = [int(word) for word in args.steps.split(",")] if args.steps is not None else []
    except ValueError as error:
        raise UserError("steps are whole numbers", where="--steps", value=args.steps, expected="100,200,300") from error
    if steps != (rising := sorted(set(steps))):
        raise UserError(
            "steps rise, as --weights go by checkpoints from the oldest on", where="--steps", value=args.steps,
            expected="each step once, oldest first", nearest=",".join(map(str, rising)),
        )  # fmt: skip
    sources = chosen_checkpoints(run, last=args.last, steps=steps)
    model = _unmerged(run, args.base)
    if args.base is None:
        load_start(list(sources.values())[-1], model)
    companions = run.parents[1] / "tokenizer"
    told: dict[str, Any] = {}
    if args.best is not None:
        reader = load_tokenizer(companions if companions.is_dir() else args.base or run, model.config)
        sources, told["held_out"] = _best(model, sources, reader, args)
    about = merge_into(model, sources, args.weights) | told
    return save(
        model.eval(),
        args.out,
        dtype=getattr(torch, args.dtype),
        source=args.base,
        provenance=about | {"steps": max(sources), "command": args.command},
        companions=companions if companions.is_dir() else None,
    )


def _unmerged(run: Path, base: Path | None) -> Ling:
    """The stage's model, with weights of `base` for what the stage did not train; without one it must have trained everything."""
    import torch

    from openling.model.families import read_config
    from openling.model.ling import Ling
    from openling.weights.folder import load

    path = run / "config.json"
    if not path.exists():
        if base is None:
            raise UserError("the run does not say of which model it is", where=run, next="--base FOLDER")
        return load(base, dtype=torch.float32).model
    config = read_config(json.loads(path.read_text()), where=path)
    loaded = None if base is None else load(base, dtype=torch.float32)
    if loaded is not None:
        _check_base(config, loaded.config, run, loaded.folder)
        config = config.replace(tie_word_embeddings=config.tie_word_embeddings or loaded.config.tie_word_embeddings)
    with torch.device("meta"):
        model = Ling(config)
    if loaded is not None:
        model.load_state_dict(loaded.model.state_dict(), assign=True)
    else:
        trained = set(json.loads((run / "train.json").read_text())["parameters"])
        if missing := sorted({name for name, _ in model.named_parameters()} - trained):
            raise UserError(
                "the run did not train every tensor", where=run, value=missing[0], next="--base FOLDER for the others"
            )
        model = model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.word_embeddings.weight
    return model


def _check_base(stage: ModelConfig, base: ModelConfig, run: Path, folder: Path) -> None:
    """A `UserError` where the base is of another shape. The stage may have changed positions: its own hold."""
    import torch

    from openling.model.families import read_config
    from openling.weights.export import ling_config

    there = read_config(ling_config(base, torch.float32))  # as the stage's own was written
    for field in dataclasses.fields(stage):
        mine, theirs = getattr(stage, field.name), getattr(there, field.name)
        if mine != theirs and field.name not in FREE_OF_BASE:
            raise UserError(
                "the base is of another model than the run", where=f"--base {folder}, {field.name}", value=theirs, expected=mine,
                next=f"the folder that {run} began with",
            )  # fmt: skip


def _best(
    model: Ling, sources: dict[int, Path], tokenizer: Any, args: argparse.Namespace
) -> tuple[dict[int, Path], dict[str, Any]]:
    """Those of the checkpoints that --best keeps, and what they were measured on, with the loss of each."""
    import torch

    from openling.data.corpus import BUILT_IN, find_corpus
    from openling.data.dataset import is_dataset, scattered_tokens
    from openling.data.pack import cut_windows, tokenise
    from openling.model.device import pick_device
    from openling.train.wsm import best_checkpoints, held_out_loss

    name, config = args.eval_text, model.config
    if tokenizer is None:
        raise UserError("the run has no tokenizer to read --eval-text with", where=args.sources[0], next="--base FOLDER with one")
    limits: dict[str, Any] = {"vocab_size": config.vocab_size, "max_tokens": EVALUATION_TOKENS}
    if is_dataset(name):
        tokens = scattered_tokens([name], tokenizer, **limits)
    else:
        tokens = tokenise(find_corpus(name).documents("heldout" if name in BUILT_IN else "all"), tokenizer, **limits)
    length = min(EVALUATION_LENGTH, config.max_position_embeddings)
    windows_NT = torch.from_numpy(cut_windows(tokens, length, where=f"--eval-text {name}")).long()
    model.eval().to(pick_device("auto"))
    chosen, losses = best_checkpoints(model, sources, args.best, lambda: held_out_loss(model, windows_NT))
    model.cpu()
    for step, loss in losses.items():
        print(f"step {step}: {loss:.4f} nats{'  kept' if step in chosen else ''}", file=sys.stderr)
    return chosen, {"text": name, "tokens": windows_NT.numel(), "losses": {str(s): loss for s, loss in losses.items()}}
