"""Lightning attention, training and prefill: fla's `chunk_simple_gla` beside our kernels, and a whole stack beside GQA's.

Legend: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from openling.bench.case import Case, Floor, Goal
from openling.ops.lightning import lightning, log_decay

# Shapes of Ling-2.6-1T (64 heads) and flash (32 heads); the goals stand for the first two.
SHAPES = ((8, 4096, 64, 128), (1, 32768, 64, 128), (1, 131072, 64, 128), (8, 4096, 32, 128), (8, 4096, 64, 64))
LAYERS = 80
OPS = ("lightning forward", "lightning forward + backward")


def cases(quick: bool) -> Iterator[Case]:
    """Forward, and forward with backward, at every shape; in quick mode at the two that have goals."""
    torch.manual_seed(0)
    for B, T, H, D in SHAPES[:2] if quick else SHAPES:
        yield from _at(B, T, H, D)
    yield _packed()


def _at(B: int, T: int, H: int, D: int) -> Iterator[Case]:
    q, k, v, dout = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) * 0.5 for _ in range(4))
    decay = log_decay(H, 0, LAYERS).cuda()
    shape, row = f"{B} x {T}, {H} heads of {D}", B * T * H * D * 2
    long = (B, T) == (1, 32768)
    bound = {(8, 4096, 64): (820, 2600), (1, 32768, 64): (820, 2768)}.get((B, T, H), (None, None)) if D == 128 else (None, None)
    peer = _fla_forward(q, k, v, decay)
    yield Case(
        op="lightning forward",
        shape=shape,
        ours=lambda: lightning(q, k, v, decay, return_state=False),
        peer=peer,
        peer_name="fla chunk_simple_gla",
        floor=Floor(bytes=4 * row, flops=_flops(B, T, H, D)),
        goal=Goal(ratio=1.8, us=bound[0]),
        note="one row of long context: cut into pieces" if long else None,
    )
    for x in (q, k, v):
        x.requires_grad_()
    yield Case(
        op="lightning forward + backward",
        shape=shape,
        ours=_with_backward(lambda: lightning(q, k, v, decay, return_state=False)[0], (q, k, v), dout),
        peer=None if peer is None else _with_backward(peer, (q, k, v), dout),
        peer_name="fla chunk_simple_gla",
        floor=Floor(bytes=11 * row, flops=_flops(B, T, H, D) + T * B * H * (10 * 64 * D + 10 * D * D)),
        goal=Goal(ratio=2.5, us=bound[1]),
    )


def _packed() -> Case:
    """One row of documents with lengths as they come, where fla needs its chunk indices."""
    lengths = torch.tensor([1, 31, 700, 64, 4000, 12000, 9, 8000, 2500, 3000, 127, 2336])
    bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).cuda()
    T, H, D = int(lengths.sum()), 64, 128
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16) * 0.5 for _ in range(3))
    decay = log_decay(H, 0, LAYERS).cuda()
    return Case(
        op="lightning forward",
        shape=f"{len(lengths)} documents in {T}, {H} heads of {D}",
        ours=lambda: lightning(q, k, v, decay, cu_seqlens=bounds),
        peer=_fla_forward(q, k, v, decay, bounds),
        peer_name="fla chunk_simple_gla",
        floor=Floor(bytes=4 * T * H * D * 2, flops=_flops(1, T, H, D)),
        goal=Goal(ratio=1.8),
    )


def _flops(B: int, T: int, H: int, D: int) -> int:
    """4 C D + 4 D^2 per token and head with chunks of C = 64 tokens."""
    return B * T * H * (4 * 64 * D + 4 * D * D)


def _fla_forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, bounds: Tensor | None = None) -> Callable[[], Tensor] | None:
    """fla's forward pass with the decays of Ling (its `lightning_attn` has other ones); None where fla is not installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    return lambda: chunk_simple_gla(q, k, v, g_gamma=decay, cu_seqlens=bounds, output_final_state=bounds is not None)[0]


def _with_backward(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), inputs, dout)
