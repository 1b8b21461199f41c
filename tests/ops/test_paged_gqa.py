"""Grouped-query decoding over pages: twin and kernel against a softmax written out in FP64, over poisoned pages.

|error| <= e (sum of p |v| + |out|), e the rounding of the softmax weights p: BF16 on a GPU, about 2^-24 times the terms of a
score in FP32 (Triton's interpreter); 2^-16 is ample for 64.
"""

import pytest
import torch

from openling.ops.attention import paged_attention

pytest.importorskip("triton")
from openling.ops.kernels import paged_gqa

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE, ROUNDING = (torch.bfloat16, 1.1 * 2**-8) if GPU else (torch.float32, 2**-16)


def problem(lengths, *, heads, kv_heads, dim, new, page=64, seed=0):
    """Pages in random order; what no sequence owns is NaN. Queries, joint key and value pages, table, lengths, rows."""
    g = torch.Generator().manual_seed(seed)
    most = max(1, max(-(-n // page) for n in lengths))
    order = torch.randperm(len(lengths) * most + 2, generator=g)
    table = order[: len(lengths) * most].view(len(lengths), most)
    pages = torch.full((len(order), page, 2 * kv_heads, dim), float("nan"), dtype=DTYPE)
    rows = []
    for n, own in zip(lengths, table, strict=True):
        own_rows = torch.randn(n, 2 * kv_heads, dim, generator=g).to(DTYPE)
        rows.append(own_rows.double())
        for i in range(-(-n // page)):
            part = own_rows[i * page : (i + 1) * page]
            pages[own[i], : len(part)] = part
    q = torch.randn(len(lengths), new, heads, dim, generator=g).to(DTYPE)
    on = [x.to(DEVICE) for x in (q, pages, table.int(), torch.tensor(lengths, dtype=torch.int32))]
    return *on, rows


def check(run, lengths, *, heads, kv_heads, dim, new):
    q, pages, table, count, rows = problem(lengths, heads=heads, kv_heads=kv_heads, dim=dim, new=new)
    out = run(q, pages[:, :, :kv_heads], pages[:, :, kv_heads:], table, count).cpu().double()
    assert out.shape == q.shape
    for b, own in enumerate(rows):
        for t in range(new):
            keys = len(own) - new + 1 + t
            for h in range(heads):
                k, v = own[:keys, h * kv_heads // heads], own[:keys, kv_heads + h * kv_heads // heads]
                p = (k @ q[b, t, h].cpu().double() * dim**-0.5).softmax(0)
                most = ROUNDING * ((p @ v.abs()) + (p @ v).abs())
                assert ((out[b, t, h] - p @ v).abs() <= most).all(), (b, t, h)


SHAPES = [
    ((1, 64, 65, 200), {"heads": 4, "kv_heads": 2, "dim": 16, "new": 1}),
    ((4, 67, 130), {"heads": 6, "kv_heads": 2, "dim": 32, "new": 4}),
    ((90,), {"heads": 3, "kv_heads": 1, "dim": 24, "new": 2}),
    ((70, 3), {"heads": 4, "kv_heads": 4, "dim": 64, "new": 3}),
]


@pytest.mark.parametrize(("lengths", "shape"), SHAPES)
def test_entry(lengths, shape):
    check(lambda *x: paged_attention(*x, scale=shape["dim"] ** -0.5), lengths, **shape)


@pytest.mark.parametrize(("lengths", "shape"), SHAPES)
@pytest.mark.parametrize("split", [64, 128])
def test_kernel(lengths, shape, split, monkeypatch):
    monkeypatch.setattr(paged_gqa, "SPLIT_TOKENS", split)
    check(lambda *x: paged_gqa.paged_attention(*x, shape["dim"] ** -0.5), lengths, **shape)


def test_kernel_repeats_bit_for_bit_in_any_batch_and_pads_with_length_zero():
    shape = {"heads": 4, "kv_heads": 2, "dim": 16, "new": 1}
    q, pages, table, count, _ = problem((70, 130, 20), **shape)
    k, v = pages[:, :, :2], pages[:, :, 2:]
    together = paged_gqa.paged_attention(q, k, v, table, count, 0.25)
    for b in range(3):
        alone = paged_gqa.paged_attention(q[b : b + 1], k, v, table[b : b + 1], count[b : b + 1], 0.25)
        assert torch.equal(alone[0], together[b])
    count[1] = 0
    assert not paged_gqa.paged_attention(q, k, v, table, count, 0.25)[1].any()
