"""CUDA graphs: a function that works on fixed memory becomes one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from openling.model.ling import Ling
from openling.ops.fused import decode_kernels
from openling.ops.pick import kernels_for

Replay = Callable[[], Any]
# Makes of a function one that does the same to the same memory; what it returns is overwritten by the next call.
Capture = Callable[[Callable[[], Any]], Replay]


class CudaCapture:
    """Captures into one memory pool, after a run that compiles what has to be compiled."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> Replay:
        """The captured function."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Any:
            graph.replay()
            return out

        return replay


def can_capture(model: Ling) -> bool:
    """Whether a decoding step of this model runs in kernels alone: the plain twins wait for the host, which a graph cannot."""
    c, weight = model.config, model.lm_head.weight
    if kernels_for(weight) is None:
        return False
    lightning = "lightning" in c.layer_kinds
    return not lightning or decode_kernels(weight, c.num_attention_heads, c.head_dim, c.group_norm_size) is not None
