"""The CPU path: chunks against the token loop, attention in blocks against torch's, decoding against the memory's speed.

The demo's training step against the spine's needs both source trees: `benchmarks/spine_step.py`.
Legend: B batch, T tokens, H heads, D head dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.bench.case import Case, Floor, Goal
from openling.model.config import LayerKind, ModelConfig
from openling.model.ling import Ling
from openling.ops.attention import softmax_attention
from openling.ops.cpu import packed_linears
from openling.ops.lightning import lightning_chunk, lightning_recurrent, log_decay

OPS = ("Lightning chunks (CPU)", "attention 96/64 (CPU)", "attention 64/64 (CPU)", "decode (CPU)")
NAMES = {torch.float32: "FP32", torch.bfloat16: "BF16"}


def cases(quick: bool) -> Iterator[Case]:
    """All of them; with `quick` those that finish in an instant."""
    for dtype in NAMES:
        yield lightning(dtype, train=False)
        if not quick:
            yield lightning(dtype, train=True)
        yield from attention(dtype, quick)
    yield tiny_decode()
    if not quick:
        yield decode()


def lightning(dtype: torch.dtype, *, train: bool) -> Case:
    """T2048 H8 D64: chunks of matrix products against the recurrence, token by token."""
    heads, dim, tokens = 8, 64, 2048
    q, k, v = leaves = [_random(1, tokens, heads, dim, dtype, train) for _ in range(3)]
    pull, g = _random(1, tokens, heads, dim, dtype, False), log_decay(heads, 3, 20)

    def step(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        if not train:
            return lambda: form(q, k, v, g)
        return lambda: torch.autograd.grad(form(q, k, v, g)[0], leaves, pull)

    rows, chunk = tokens * heads, 64
    flops = rows * (4 * chunk * dim + 4 * dim * dim) * (1 if not train else 3)
    floor = Floor(rows * dim * dtype.itemsize * (4 if not train else 11), flops)
    name = f"T{tokens} H{heads} D{dim} {NAMES[dtype]}" + (" fwd+bwd" if train else "")
    # The goal was set for a token loop with its gradients; without them the loop runs in place and is 20 times as fast.
    goal = Goal(ratio=30) if train else None
    return Case("Lightning chunks (CPU)", name, step(lightning_chunk), step(lightning_recurrent), "token loop", floor, goal)


def attention(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Causal attention at 96/64 (an MLA layer's heads) and 64/64 grouped (SmolLM2's), forward and with gradients."""
    for train in (False,) if quick else (False, True):
        unequal, padded, equal = (_attention(1, 2048, (8, 8), 96, width, dtype, train) for width in (64, 64, 96))
        ours, peer, floor, name = unequal
        yield Case("attention 96/64 (CPU)", name, ours, peer, "SDPA, V as it is", floor, Goal(ratio=5) if not train else None)
        yield Case("attention 96/64 (CPU)", name, padded[0], equal[1], "SDPA of equal dims 96/96", floor, Goal(ratio=1 / 1.15))
        ours, peer, floor, name = _attention(2, 512, (9, 3), 64, 64, dtype, train)
        yield Case("attention 64/64 (CPU)", name, ours, peer, "SDPA", floor)


def _attention(
    batch: int, tokens: int, heads: tuple[int, int], dim: int, width: int, dtype: torch.dtype, train: bool
) -> tuple[Callable[[], object], Callable[[], object], Floor, str]:
    """Ours, SDPA's, the floor and the shape's name."""
    H, K = heads
    q, k, v = leaves = [_random(batch, tokens, h, d, dtype, train) for h, d in ((H, dim), (K, dim), (K, width))]
    pull = _random(batch, tokens, H, width, dtype, False)

    def sdpa() -> Tensor:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=H != K).transpose(1, 2)

    def ours() -> Tensor:
        return softmax_attention(q, k, v, scale=dim**-0.5)

    def step(form: Callable[[], Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(form(), leaves, pull)) if train else form

    pairs = batch * H * tokens * (tokens + 1) // 2
    moved = batch * tokens * (H + K) * (dim + width) * dtype.itemsize
    floor = Floor(moved * (3 if train else 1), 2 * pairs * (dim + width + (3 * dim + 2 * width if train else 0)))
    return step(ours), step(sdpa), floor, f"B{batch} T{tokens} H{H}/{K} {NAMES[dtype]}" + (" fwd+bwd" if train else "")


def tiny_decode() -> Case:
    """One token of a model whose 12 layers cost next to nothing: what is left is the dispatch of their ops."""
    call, size = _decoder(12, 64, 160, 4, 16, 512, torch.float32)
    return Case("decode (CPU)", "12 layers of 64, FP32", call, None, None, Floor(size), Goal(us=2000))


def decode() -> Case:
    """One token of a 150 M hybrid in BF16 against reading its weights once at the speed of a copy."""
    call, size = _decoder(30, 576, 1536, 9, 64, 49152, torch.bfloat16)
    return Case("decode (CPU)", f"30 layers of 576, BF16, {size / 1e6:.0f} MB", call, None, None, Floor(size), Goal(fraction=0.6))


def _decoder(
    layers: int, hidden: int, inner: int, heads: int, dim: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """A call that decodes one more token after 128, and the bytes of the weights it reads."""
    kinds: tuple[LayerKind, ...] = tuple("mla" if (i + 1) % 6 == 0 else "lightning" for i in range(layers))
    config = ModelConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=dim, layer_kinds=kinds, tie_word_embeddings=True,
        kv_lora_rank=3 * dim, qk_nope_head_dim=dim // 2, qk_rope_head_dim=dim // 2, v_head_dim=dim,
    )  # fmt: skip
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to(dtype).eval()
    token, cache = torch.zeros(1, 1, dtype=torch.long), model.new_cache()
    with torch.inference_mode():
        model(token.expand(1, 128), cache=cache)
    packed = ExitStack()
    packed.enter_context(packed_linears(model))

    def call(packed: ExitStack = packed) -> Tensor:  # the weights stay packed for as long as the call lives
        with torch.inference_mode():
            return model(token, cache=cache)

    return call, sum(p.nbytes for p in model.parameters())


def _random(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, leaf: bool) -> Tensor:
    return torch.randn(batch, tokens, heads, dim, dtype=dtype, requires_grad=leaf)
