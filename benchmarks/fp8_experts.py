"""Routed experts in FP8 beside BF16, forward + backward from FP32 masters to FP32 gradients, by shape; and where FP8's time goes.

    python benchmarks/fp8_experts.py [--form rowwise blockwise] [--only mini flash 1t] [--profile] [--out FILE]

Rows per expert are as even as random choices make them. The two take turns in one process; medians. `blockwise` without DeepGEMM
is what torchao does then: products in BF16. --profile prints the longest kernels of one FP8 call instead of writing results, to
benchmarks/results/kernels/fp8-experts-DEVICE.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from openling.environment import write_results
from openling.ops.fp8 import fp8_experts
from openling.ops.moe import swiglu_experts

RESULTS = Path(__file__).parent / "results" / "kernels"
# Tokens, model width, expert width, experts of one GPU, experts per token of those.
SHAPES = {
    "1b-moe": (16384, 2048, 512, 64, 8),
    "mini": (32768, 2048, 512, 256, 8),
    "flash": (32768, 4096, 1024, 32, 4),
    "1t": (32768, 8192, 2048, 8, 2),
}


def inputs(tokens: int, model: int, width: int, experts: int, top_k: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Leaves in the order of `swiglu_experts`, choices, and the gradient of the result."""
    torch.manual_seed(0)
    x, dout = (torch.randn(tokens, model, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(tokens, top_k, device="cuda")
    gate, up = (torch.randn(experts, width, model, device="cuda") * model**-0.5 for _ in range(2))
    down = torch.randn(experts, model, width, device="cuda") * width**-0.5
    index = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    return [t.requires_grad_() for t in (x, weight, gate, up, down)], index, dout


def call_of(experts: Callable[..., Tensor], leaves: list[Tensor], index: Tensor, dout: Tensor) -> Callable[[], object]:
    """Forward and all gradients."""
    x, weight, *parts = leaves
    return lambda: torch.autograd.grad(experts(x, weight, index, *parts), leaves, dout)


def milliseconds(calls: list[Callable[[], object]], rounds: int = 12) -> list[float]:
    """Medians of single calls that take turns, two rounds to warm up left out."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 2):
        for call, found in zip(calls, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
    return [median(found[2:]) for found in times]


def show_kernels(call: Callable[[], object]) -> None:
    """The longest kernels of one call."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70))


def measured(name: str, form: Any) -> dict[str, Any]:
    """One row: milliseconds of FP8 and of BF16."""
    tokens, model, width, experts, top_k = SHAPES[name]
    leaves, index, dout = inputs(*SHAPES[name])
    fp8 = call_of(partial(fp8_experts, form=form), leaves, index, dout)
    fp8_ms, bf16_ms = milliseconds([fp8, call_of(swiglu_experts, leaves, index, dout)])
    shape = f"{tokens} tokens of {model}, {experts} experts of {width}, {top_k} each"
    flops = 18 * tokens * top_k * model * width
    rate = {"tflops": flops / fp8_ms / 1e9, "peer_tflops": flops / bf16_ms / 1e9}
    about = {"peer": "BF16 kernels", "peer_value": bf16_ms, "ratio": bf16_ms / fp8_ms}
    return {"name": f"{name}, {form}: {shape}", "value": fp8_ms, "unit": "ms"} | about | rate


def main() -> None:
    """Measure the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", nargs="+", choices=["rowwise", "blockwise"], default=["rowwise"])
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or RESULTS / f"fp8-experts-{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    rows = []
    for name in args.only:
        for form in args.form:
            if args.profile:
                leaves, index, dout = inputs(*SHAPES[name])
                print(f"{name}, {form}")
                show_kernels(call_of(partial(fp8_experts, form=form), leaves, index, dout))
                continue
            rows.append(measured(name, form))
            print(rows[-1], flush=True)
            write_results(out, shlex.join(["python", *sys.argv]), rows)


if __name__ == "__main__":
    main()
