"""What `conftest` changes in Triton's interpreter changes no result."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _ends(first, last, other_first, other_last):
    """Associative, and which operand comes first matters."""
    return first, other_last


@triton.jit
def _kernel(x, first, last, AXIS: tl.constexpr, KEPT: tl.constexpr):
    rows, columns = tl.arange(0, 8)[:, None], tl.arange(0, 4)[None, :]
    block = tl.load(x + rows * 4 + columns)
    ends = tl.reduce((block, block), AXIS, _ends, keep_dims=True)
    at = columns if AXIS == 0 else rows
    if not KEPT:
        flat = tl.reduce((block, block), AXIS, _ends)
        ends = flat[0].reshape(ends[0].shape), flat[1].reshape(ends[1].shape)
    tl.store(first + at, ends[0])
    tl.store(last + at, ends[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where there is a GPU")
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_joins_neighbours_in_their_order(axis, kept):
    x = torch.randn(8, 4)
    first, last = (torch.full((x.shape[1 - axis],), float("nan")) for _ in range(2))
    _kernel[(1,)](x, first, last, AXIS=axis, KEPT=kept)
    assert torch.equal(first, x.select(axis, 0))
    assert torch.equal(last, x.select(axis, -1))
