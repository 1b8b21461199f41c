"""MLA and softmax attention: decoding over paged latents, prefill and training at 192/128 and 128 (GQA), packed documents.

Decoding is measured without the up-projections around it, which are matrix products on both sides. Its peer is plain PyTorch
on one buffer per sequence. Prefill has every backend of SDPA as a peer: ours must be no slower than the best of them.
Legend: B sequences, T new tokens, S keys, H heads, R = 512 latent values, r = 64 rotated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openling.bench.case import Case, Floor, Goal
from openling.ops.attention import causal_mask, latent_context, softmax_attention
from openling.ops.kernels import mla_decode

RANK, ROPE, NOPE, VALUE, PAGE = 512, 64, 128, 128, 64
SCALE = (NOPE + ROPE) ** -0.5
L2_BYTES = 60 * 2**20
OPS = ("MLA decode", "MLA attention", "GQA attention", "MLA attention, continued", "MLA attention, packed")
# "No slower than the best backend", measured twice, differs by this much.
NO_SLOWER = Goal(ratio=0.97)
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash, V padded": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(quick: bool) -> Iterator[Case]:
    """All of them, or with `quick` one of each kind."""
    yield from _decode_cases(quick)
    yield from _prefill_cases(quick)
    yield from _continued_cases(quick)
    yield from _packed_cases(quick)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def _decode_cases(quick: bool) -> Iterator[Case]:
    yield decode(32, 32768, goal=Goal(fraction=0.75, us=379))
    if quick:
        return
    yield decode(32, 32768, mode="eager")
    yield decode(128, 4096, goal=Goal(us=200))
    yield decode(1, 32768)
    yield decode(1, 262144)
    yield decode(8, 32768)
    yield decode(32, 4096)
    yield decode(32, 32768, heads=32)
    yield decode(32, 32768, new=2)
    yield decode(128, 4096, new=2, heads=32)
    yield decode(32, 32768, split_tokens=2048)
    yield decode(128, 4096, split_tokens=2048)
    yield decode(32, 32768, ragged=True)


def decode(
    batch: int, keys: int, *, new: int = 1, heads: int = 64, split_tokens: int = 0, ragged: bool = False, mode: str = "graph",
    goal: Goal | None = None,
) -> Case:  # fmt: skip
    """One step of `batch` sequences with `keys` keys; ragged: from a sixteenth of that up to all of it."""
    lengths = torch.full((batch,), keys)
    if ragged:
        lengths = torch.linspace(keys // 16, keys, batch).int()
    size = batch * keys * (RANK + ROPE) * 2
    # A cache that fits into L2 is read from several pools in turn.
    pools = cycle([_pool(batch, keys) for _ in range(max(1, -(-4 * L2_BYTES // size) if size < 4 * L2_BYTES else 1))])
    q_latent, q_rope = (torch.randn(batch, new, heads, d, device="cuda", dtype=torch.bfloat16) for d in (RANK, ROPE))
    device_lengths = lengths.to("cuda", torch.int32)

    def ours() -> Tensor:
        pages, table = next(pools)
        return mla_decode(q_latent, q_rope, pages[..., :RANK], pages[..., RANK:], table, device_lengths, SCALE, split_tokens)

    def peer() -> Tensor:
        rows = next(pools)[0].view(batch, keys, RANK + ROPE)
        mask = causal_mask(new, keys, None, rows.device) if new > 1 else None
        return latent_context(q_latent, q_rope, rows[..., :RANK], rows[..., RANK:], mask, SCALE)

    read = int(lengths.sum()) * (RANK + ROPE) * 2
    floor = Floor(bytes=read, flops=int(lengths.sum()) * new * heads * 2 * (2 * RANK + ROPE))
    shape = (
        f"B{batch} S{keys} H{heads} T{new}" + (" ragged" if ragged else "") + (f" split {split_tokens}" if split_tokens else "")
    )
    plain = None if ragged else peer
    return Case(
        "MLA decode", shape, ours, plain, "plain PyTorch" if plain else None, floor, goal, "eager" if mode == "eager" else "graph"
    )


def _pool(batch: int, keys: int) -> tuple[Tensor, Tensor]:
    """Pages of random rows, and a table that goes through them in random order."""
    count = batch * keys // PAGE
    pages = torch.empty(count, PAGE, RANK + ROPE, device="cuda", dtype=torch.bfloat16).normal_()
    return pages, torch.randperm(count, device="cuda", dtype=torch.int32).view(batch, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Prefill and training
# ---------------------------------------------------------------------------------------------------------------------


def _prefill_cases(quick: bool) -> Iterator[Case]:
    for batch, tokens in ((8, 4096),) if quick else ((8, 4096), (1, 32768)):
        for train in (False,) if quick else (False, True):
            for name in ("default", *BACKENDS):
                yield prefill("MLA attention", batch, tokens, (64, 64, NOPE + ROPE, VALUE), name, train=train)
    if not quick:
        for train in (False, True):
            for name in ("default", "cuDNN", "flash, V padded"):
                yield prefill("GQA attention", 8, 4096, (32, 4, 128, 128), name, train=train)


def prefill(op: str, batch: int, tokens: int, heads: tuple[int, int, int, int], backend: str, *, train: bool) -> Case:
    """`softmax_attention` of H query heads, K key heads, D and V wide, against one backend of SDPA."""
    H, K, dim, width = heads
    q, k, v = made = [_random(batch, tokens, h, d, train) for h, d in ((H, dim), (K, dim), (K, width))]
    pull = _random(batch, tokens, H, width, False) if train else None
    ours = _step(lambda: softmax_attention(q, k, v, scale=dim**-0.5), made, pull)
    peer = _step(lambda: _sdpa(q, k, v, dim**-0.5, backend), made, pull)
    pairs = batch * H * tokens * (tokens + 1) // 2
    rows = batch * tokens * (H * (dim + width) + K * (dim + width)) * 2
    # Backward: scores again, dP, dQ, dK at D and V wide, dV; twice the bytes and the gradients.
    floor = Floor(rows * (3 if train else 1), 2 * pairs * (dim + width + (3 * dim + 2 * width if train else 0)))
    shape = f"B{batch} T{tokens} H{H}/{K} D{dim}/{width}" + (" fwd+bwd" if train else "")
    return Case(op, shape, ours, peer, f"SDPA {backend}", floor, NO_SLOWER)


def _random(batch: int, tokens: int, heads: int, dim: int, leaf: bool) -> Tensor:
    return torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=leaf)


def _step(forward: Callable[[], Tensor], leaves: list[Tensor], pull: Tensor | None) -> Callable[[], object]:
    """The forward pass, or with `pull`, the gradient of the output, both passes."""
    if pull is None:
        return forward
    return lambda: torch.autograd.grad(forward(), leaves, pull)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, mask: Tensor | None = None) -> Tensor:
    """SDPA by one backend, "default" by torch's choice; [B, T, H, V]."""
    gqa, width, dim = q.shape[2] != k.shape[2], v.shape[3], q.shape[3]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "flash, V padded" and width < dim:
        v = F.pad(v, (0, dim - width))
    allowed = list(BACKENDS.values()) + [SDPBackend.MATH] if backend == "default" else BACKENDS[backend]
    with sdpa_kernel(allowed):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return out[..., :width].transpose(1, 2)


def _continued_cases(quick: bool) -> Iterator[Case]:
    for backend in () if quick else ("default", "cuDNN"):
        yield continued(4096, 32768, backend)


def continued(new: int, keys: int, backend: str) -> Case:
    """A chunk of a long prompt: `new` tokens over `keys` keys, 64 heads of 192/128."""
    dim = NOPE + ROPE
    q, k, v = (_random(1, n, 64, d, False) for n, d in ((new, dim), (keys, dim), (keys, VALUE)))
    mask = causal_mask(new, keys, None, q.device)
    pairs = 64 * (new * (keys - new) + new * (new + 1) // 2)
    floor = Floor(2 * 64 * (new + keys) * (dim + VALUE), 2 * pairs * (dim + VALUE))
    return Case(
        "MLA attention, continued", f"T{new} of S{keys} H64 D{dim}/{VALUE}", lambda: softmax_attention(q, k, v, scale=SCALE),
        lambda: _sdpa(q, k, v, SCALE, backend, mask), f"SDPA {backend}, mask", floor, NO_SLOWER,
    )  # fmt: skip


def _packed_cases(quick: bool) -> Iterator[Case]:
    for documents, tokens in () if quick else ((8, 4096), (64, 512)):
        for train in (False, True):
            yield packed(documents, tokens, train=train)


def packed(documents: int, tokens: int, *, train: bool) -> Case:
    """Documents of one length in one row, 64 heads of 192/128; peer: cuDNN, document by document, bounds known on the host."""
    dim, total = NOPE + ROPE, documents * tokens
    made = [_random(1, total, 64, d, train) for d in (dim, dim, VALUE)]
    pull = _random(1, total, 64, VALUE, False) if train else None
    bounds = torch.arange(0, total + 1, tokens, dtype=torch.int32, device="cuda")

    def one_by_one() -> Tensor:
        q, k, v = (x.split(tokens, dim=1) for x in made)
        return torch.cat([_sdpa(*parts, SCALE, "cuDNN") for parts in zip(q, k, v, strict=True)], dim=1)

    ours = _step(lambda: softmax_attention(*made, scale=SCALE, cu_seqlens=bounds), made, pull)
    pairs = documents * 64 * tokens * (tokens + 1) // 2
    floor = Floor(2 * total * 64 * 2 * (dim + VALUE), 2 * pairs * (dim + VALUE + (3 * dim + 2 * VALUE if train else 0)))
    shape = f"{documents} x {tokens} H64 D{dim}/{VALUE}" + (" fwd+bwd" if train else "")
    return Case("MLA attention, packed", shape, ours, _step(one_by_one, made, pull), "cuDNN in a loop", floor)
