"""Long sequences of few heads, cut into pieces that run side by side.

A scan has one program per head, sequence and block of columns: too few to fill a GPU when the batch is one long row. The row
is then cut into pieces; `piece_states` sums what each adds to the state, `fold` carries the sums from piece to piece, and the
scan runs over the pieces as if each were a sequence with an initial state. Reading keys and values once more costs at most
half of a forward pass, and mostly far less: a piece's rows count for its final state only over the decay's horizon.

Nothing here waits for the GPU: numbers of pieces are bounded from the shapes alone.
Legend: N documents, P pieces, H heads, K and V head dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Beyond this many bits of decay an old token changes nothing in FP32 (24 bits), even one 250 times as large as the newest.
HORIZON_BITS = 32
SHORTEST = 512
CHUNK = 64
COLUMNS = 64


class Pieces(NamedTuple):
    """bounds int32 [P + 1], document of each piece int32 [P], first and last piece of each document int64 [N].

    Pieces behind the last document's are empty.
    """

    bounds: Tensor
    document: Tensor
    first: Tensor
    last: Tensor


def piece_length(tokens: int, rows: int, documents: int, programs: int, slots: int) -> int | None:
    """Tokens of a piece, where `rows` rows hold `documents` documents and a document alone runs `programs` of `slots` programs.

    None where nothing is to be gained: the documents fill the GPU, or a row is short.
    """
    wanted = slots // (rows * programs)
    if wanted < 2 or tokens < 2 * SHORTEST or documents > rows * 2 * wanted:
        return None
    return max(SHORTEST, triton.cdiv(triton.cdiv(tokens, wanted), CHUNK) * CHUNK)


def cut(bounds_N: Tensor, tokens: int, length: int) -> Pieces:
    """Cut documents with bounds [N + 1] over `tokens` tokens into pieces of at most `length`, without a host sync."""
    documents = bounds_N.numel() - 1
    bounds = bounds_N.long()
    counts = torch.div(bounds.diff() + length - 1, length, rounding_mode="floor").clamp(min=1)
    after = counts.cumsum(0)
    piece = torch.arange(tokens // length + documents, device=bounds.device)
    document = torch.searchsorted(after, piece, right=True).clamp(max=documents - 1)
    start = bounds[document] + (piece - (after - counts)[document]) * length
    start = torch.minimum(start, bounds[document + 1])
    return Pieces(torch.cat((start, bounds[-1:])).int(), document.int(), after - counts, after - 1)


@triton.jit
def states_kernel(
    b, c, states, log2_decay, bounds, document, b_stride, c_stride, heads, pieces, scale, bits,
    K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (column blocks, heads, pieces). Forward: sum of lam^(tokens to the end) b^T c; reverse: to before the start, scaled.

    The piece whose sum nobody reads (a document's last, in reverse its first) is left out.
    """
    head, p = tl.program_id(1), tl.program_id(2)
    here = tl.load(document + p)
    neighbour = tl.load(document + (tl.maximum(p - 1, 0) if REVERSE else tl.minimum(p + 1, pieces - 1)))
    outermost = p == 0 if REVERSE else p == pieces - 1
    first = tl.load(bounds + p).to(tl.int64)
    length = (tl.load(bounds + p + 1) - first).to(tl.int32)
    if outermost or neighbour != here:
        length = 0
    g = tl.load(log2_decay + head)
    horizon = tl.minimum(-bits / tl.minimum(g, -1e-30), 2.0e9).to(tl.int32) + 1
    begin = 0 if REVERSE else tl.maximum(length - horizon, 0) // CHUNK
    end = tl.cdiv(tl.minimum(length, horizon) if REVERSE else length, CHUNK)
    row = tl.arange(0, CHUNK)
    column_b = tl.arange(0, K_PAD)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    state = tl.zeros((K_PAD, COLUMNS), tl.float32)
    for step in range(begin, end):
        place = step * CHUNK + row
        there = (place < length)[:, None]
        token = (first + place)[:, None]
        b_mask = there & (column_b < K)[None, :]
        b_tile = tl.load(b + token * b_stride + head * K + column_b[None, :], mask=b_mask, other=0.0)
        c_mask = there & (column < V)[None, :]
        c_tile = tl.load(c + token * c_stride + head * V + column[None, :], mask=c_mask, other=0.0)
        distance = place + 1 if REVERSE else tl.maximum(length - 1 - place, 0)
        faded = (c_tile * (tl.exp2(g * distance) * scale)[:, None]).to(c_tile.dtype)
        state = tl.dot(tl.trans(b_tile), faded, state, input_precision=PRECISION)
    at = (p.to(tl.int64) * heads + head) * (K * V) + column_b[:, None] * V + column[None, :]
    tl.store(states + at, state, mask=(column_b < K)[:, None] & (column < V)[None, :])


@triton.jit
def fold_kernel(
    states, outside, log2_decay, bounds, document, heads, pieces,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of a state's values, heads). Turns the sums into the state each piece begins with, in place."""
    head = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    g = tl.load(log2_decay + head)
    state = tl.zeros((BLOCK,), tl.float32)
    previous = -1
    for step in range(pieces):
        p = pieces - 1 - step if REVERSE else step
        here = tl.load(document + p)
        if here != previous:
            if HAS_OUTSIDE:
                state = tl.load(outside + (here.to(tl.int64) * heads + head) * SIZE + at, mask=inside, other=0.0)
            else:
                state = tl.zeros((BLOCK,), tl.float32)
        previous = here
        place = states + (tl.cast(p, tl.int64) * heads + head) * SIZE + at
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        state = state * tl.exp2(g * (tl.load(bounds + p + 1) - tl.load(bounds + p))) + added


def incoming_states(
    b: Tensor, c: Tensor, g: Tensor, pieces: Pieces, heads: int, scale: float, outside: Tensor | None, *, reverse: bool
) -> Tensor:
    """The state before each piece FP32 [P, H, K, V] (in reverse: the gradient behind it).

    b [rows, H*K] and c [rows, H*V] are keys and values, in reverse queries and output gradients; g log2 of the decay [H];
    `outside` [N, H, K, V] is what the documents begin with.
    """
    count, K, V = pieces.document.numel(), b.shape[1] // heads, c.shape[1] // heads
    states = torch.empty((count, heads, K, V), dtype=torch.float32, device=b.device)
    pad = padded(K)
    states_kernel[(triton.cdiv(V, COLUMNS), heads, count)](
        b, c, states, g, pieces.bounds, pieces.document, b.stride(0), c.stride(0), heads, count, scale, HORIZON_BITS,
        K=K, V=V, K_PAD=pad, COLUMNS=COLUMNS, CHUNK=CHUNK, REVERSE=reverse,
        PRECISION="ieee" if b.dtype == torch.float32 else "tf32", num_warps=4 if pad <= 64 else 8, num_stages=3,
    )  # fmt: skip
    fold_kernel[(triton.cdiv(K * V, 1024), heads)](
        states, states if outside is None else outside, g, pieces.bounds, pieces.document, heads, count,
        SIZE=K * V, BLOCK=1024, REVERSE=reverse, HAS_OUTSIDE=outside is not None,
    )  # fmt: skip
    return states


def whole_rows(batch: int, tokens: int, count: int, device: torch.device, *, reverse: bool) -> Pieces:
    """Rows of `tokens` tokens in `count` pieces each, and a piece without a token behind them, in reverse before them.

    Nobody reads what the outermost piece adds, so the state before that empty piece is what the whole row leaves.
    """
    length = triton.cdiv(tokens, count)
    starts = (torch.arange(count + 1, device=device) * length).clamp(max=tokens)
    starts = torch.cat((starts[:1], starts[:-1])) if reverse else starts
    first = torch.arange(batch, device=device)
    bounds = torch.cat(((first[:, None] * tokens + starts).flatten(), first[-1:] * tokens + tokens))
    document = first.repeat_interleave(count + 1, output_size=batch * (count + 1))
    return Pieces(bounds.int(), document.int(), first * (count + 1), first * (count + 1) + count)


def padded(dim: int) -> int:
    """Rows of a tile for a head dim. With 16 columns, Triton 3.6 compiles the second chunk wrongly: none are that small."""
    return max(COLUMNS, triton.next_power_of_2(dim))
