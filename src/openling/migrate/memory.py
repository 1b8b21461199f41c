"""What a conversion from disk holds in memory, and what a byte budget leaves for reading experts fewer times.

A fit takes what it takes: a layer without its routed experts, the new mixer, its matrices, one batch of tokens. What is left of
the budget is room for the rows that experts give: as many batches as fit in go through an expert at once (`stack.pass_layers`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openling.migrate.stack import rows_bytes
from openling.weights.files import PIECE

if TYPE_CHECKING:
    from openling.migrate.stream import Outline

# Files that are moved at the same time: hashing one overlaps with reading and writing another.
MOVERS = 2
BUDGET = 4 << 30
# Square FP64 matrices over a layer's heads that a fit holds at once: two sums of products, a factorisation and its work space.
FIT_SQUARES = 5
# Vectors of a token, in FP32, that a fit holds of a batch: 12.4 by `benchmarks/streaming.py WORK memory`.
TOKEN_VECTORS = 13
STREAMS = 2  # the teacher's and the student's


def fit_bytes(plan: Outline, tokens: int) -> int:
    """Copying in pieces, and a fit to batches of so many tokens: what is in memory beyond Python and torch."""
    c = plan.target
    layers: dict[str, int] = {}
    for name, shape in plan.opened.shapes.items():
        if name.startswith("model.layers.") and ".mlp.experts." not in name:
            prefix = ".".join(name.split(".")[:3])
            layers[prefix] = layers.get(prefix, 0) + shape.numel() * 4
    mixers: dict[str, int] = {}
    for name, shape in plan.new.items():
        prefix = ".".join(name.split(".")[:3])
        mixers[prefix] = mixers.get(prefix, 0) + shape.numel() * 4
    width = c.num_attention_heads * max(c.head_dim, c.qk_head_dim)
    weights = max(layers.values()) + 2 * max(mixers.values(), default=0)
    return 2 * MOVERS * PIECE + weights + FIT_SQUARES * 8 * width**2 + TOKEN_VECTORS * 4 * max(width, c.hidden_size) * tokens


def room(plan: Outline, tokens: int, budget: int) -> int:
    """Bytes that a budget leaves beside the fit."""
    return max(0, budget - fit_bytes(plan, tokens))


def together(plan: Outline, batches: list[int], budget: int) -> int:
    """Batches of text, of both streams, that go through an expert at once: one at least."""
    tokens = max(batches)
    return min(len(batches), max(1, room(plan, tokens, budget) // (STREAMS * tokens * rows_bytes(plan.target))))


def peak_bytes(plan: Outline, batches: list[int], budget: int) -> int:
    """A fit, and behind it the experts' rows of the batches that go through them together."""
    rows = STREAMS * rows_bytes(plan.target) * max(batches) * together(plan, batches, budget) if plan.target.num_experts else 0
    return fit_bytes(plan, max(batches)) + rows
