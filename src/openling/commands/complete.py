"""`openling generate`: one completion from any checkpoint folder, teacher or hybrid, printed as it comes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openling.errors import UserError

if TYPE_CHECKING:
    from openling.weights.folder import Loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling generate`."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("prompt", help="text to continue; '-' reads standard input")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags shared with `openling chat`."""
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The flag of every verb that runs a model."""
    said = "in which weights are computed; auto (default): as stored, but on a CPU what it multiplies fastest"
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=said)


def run(args: argparse.Namespace) -> int:
    """Print the completion; exit code 0."""
    prompt = _utf8(sys.stdin.read() if args.prompt == "-" else args.prompt)
    if not prompt:
        raise UserError("the prompt is empty", expected="at least one character")
    loaded = load_to_talk(args)
    message = [{"role": "user", "content": prompt}]
    ids = render_chat(loaded, message) if args.chat else loaded.tokenizer(prompt)["input_ids"]
    say(loaded, ids, args)
    return 0


def _utf8(text: str) -> str:
    """`text`, if every byte that it was read from was UTF-8; Python stands in for others with lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8", where=f"character {error.start}", expected="UTF-8 text") from error
    return text


def load_to_talk(args: argparse.Namespace) -> Loaded:
    """The model on its device, with a tokenizer; the sampling flags checked before the weights are read."""
    from openling.model.device import pick_device
    from openling.ops.pick import kernels_reason
    from openling.weights.dtype import load_computed

    sampling(args)
    device = pick_device(args.device)
    loaded, computed = load_computed(args.model, dtype=args.dtype, device=device)
    print(f"Ops: {kernels_reason(device)}. Weights: {computed}.", file=sys.stderr)
    if loaded.tokenizer is None:
        raise UserError(
            "the folder has no tokenizer", where=args.model, expected="tokenizer.json", next="copy the teacher's there"
        )
    return loaded


def sampling(args: argparse.Namespace) -> Any:
    """The `Sampling` that the flags describe."""
    from openling.model.generate import Sampling

    return Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, max_new_tokens=args.max_new_tokens
    )


def render_chat(loaded: Loaded, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation and the opening of the assistant's turn."""
    from openling.data.chat import ChatRenderer

    return ChatRenderer(loaded.tokenizer).encode(messages)


def say(loaded: Loaded, ids: list[int], args: argparse.Namespace) -> str:
    """Print a completion as it is made, and return it."""
    import torch

    from openling.model.generate import decode, stop_ids
    from openling.serve.detokenize import stream_text

    prompt = torch.tensor([ids], device=loaded.model.lm_head.weight.device)
    rows = decode(loaded.model, prompt, sampling(args), stop_ids=stop_ids(loaded.tokenizer, loaded.config))
    parts: list[str] = []
    for piece in stream_text(loaded.tokenizer, (row[0] for row in rows if row[0] is not None)):
        parts.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(parts)
