"""The Lightning kernels against the recurrence in FP64: outputs, states, every gradient.

Tolerances. FP32 (Triton's interpreter on a CPU): sums of at most T + D terms of random signs, error growing with the square
root of their count: 8 sqrt(T + D) 2^-24 of the largest value. BF16 (GPU): inputs are exact; weights, states and
faded values are rounded before each product and the output once more. A BF16 rounding errs by 2^-8 at most, so by 2^-8 / sqrt(3)
= 2.3e-3 in the mean at most; four independent ones in quadrature are twice that.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.ops.context_parallel import state_after, state_before
from openling.ops.lightning import lightning_chunk, lightning_recurrent, log_decay

pytest.importorskip("triton")
from openling.ops.kernels import lightning as lightning_kernels  # noqa: E402
from openling.ops.kernels import lightning_pieces  # noqa: E402
from openling.ops.kernels.lightning import lightning_backward, lightning_forward  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def problem(batch, tokens, heads, key_dim, value_dim, cu_seqlens=None, initial=False, decay=None, seed=0):
    """Inputs, exactly representable in DTYPE, as FP64 leaves on the GPU or CPU, and the gradients that come from outside."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape, dtype=DTYPE):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE).double()

    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    q, k = (values(batch, tokens, heads, key_dim).requires_grad_() for _ in range(2))
    v = values(batch, tokens, heads, value_dim).requires_grad_()
    state = values(documents, heads, key_dim, value_dim, dtype=torch.float32).requires_grad_() if initial else None
    g = (log_decay(heads, 0, 4) if decay is None else torch.tensor(decay)).float().to(DEVICE)
    cut = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    dout, dfinal = values(*v.shape), values(documents, heads, key_dim, value_dim, dtype=torch.float32)
    return q, k, v, g, state, cut, dout, dfinal


def check(*args, **kwargs):
    q, k, v, g, state, cut, dout, dfinal = problem(*args, **kwargs)
    exact_form = lightning_recurrent if q.shape[1] < 300 else lightning_chunk
    out, final = exact_form(q, k, v, g.double(), initial_state=state, cu_seqlens=cut)
    ((out * dout).sum() + (final * dfinal).sum()).backward()
    low = [x.detach().to(DTYPE) for x in (q, k, v)]
    first = None if state is None else state.detach().float()
    scale = q.shape[-1] ** -0.5
    fast = lightning_forward(*low, g, first, cut, scale, True)
    grads = lightning_backward(dout.to(DTYPE), dfinal.float(), *low, g, first, cut, scale)
    exact = [out, final, q.grad, k.grad, v.grad] + ([] if state is None else [state.grad])
    for name, got, wanted in zip(("out", "final", "dq", "dk", "dv", "dinitial"), (*fast, *grads), exact, strict=False):
        close(name, got, wanted.detach(), q.shape[1] + q.shape[-1])


def close(name, got, wanted, terms):
    assert got.isfinite().all(), name
    if wanted.numel() == 0:
        return
    error = got.double() - wanted
    if not CUDA:
        assert error.abs().max() <= 8 * math.sqrt(terms) * 2**-24 * wanted.abs().max(), name
    else:
        assert error.pow(2).mean().sqrt() <= 2 * 2.3e-3 * wanted.pow(2).mean().sqrt(), name


@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 140), heads=st.integers(1, 3), key_dim=st.sampled_from([16, 24, 64]),
    value_dim=st.sampled_from([16, 40, 64]), initial=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15 if CUDA else 8, deadline=None)
def test_random_shapes(batch, tokens, heads, key_dim, value_dim, initial, seed):
    check(batch, tokens, heads, key_dim, value_dim, initial=initial, seed=seed)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 200])
@pytest.mark.parametrize("dim", [64, 128])
def test_lengths_around_a_chunk(tokens, dim):
    check(1, tokens, 2, dim, dim, initial=True)


@given(cuts=st.lists(st.integers(0, 150), max_size=6), seed=st.integers(0, 99))
@settings(max_examples=10 if CUDA else 6, deadline=None)
def test_packed_documents(cuts, seed):
    check(1, 150, 2, 64, 64, cu_seqlens=sorted([0, 150, *cuts]), initial=True, seed=seed)


@pytest.fixture
def cut_into_pieces(monkeypatch):
    """Rows cut every 64 tokens, as a GPU cuts long ones."""
    monkeypatch.setattr(lightning_kernels, "_slots", lambda device: 1000)
    monkeypatch.setattr(lightning_pieces, "SHORTEST", 64)


DOCUMENTS = [0, 0, 70, 70, 100, 300, 300]
PIECES = list(itertools.product([False, True], [None, DOCUMENTS, [0, 300]], [None, [-1e-6, -3.0]]))


# Seconds each in the interpreter: there rows have an initial state where a decay is weak enough to keep it, and none otherwise.
@pytest.mark.parametrize(("initial", "cuts", "decay"), PIECES if CUDA else [p for p in PIECES if p[0] == (p[2] is not None)])
def test_pieces_of_a_row_give_the_whole(cut_into_pieces, initial, cuts, decay):
    check(2 if cuts is None else 1, 300, 2, 64, 64, cu_seqlens=cuts, initial=initial, decay=decay)


def test_batch_invariant_mode_does_not_cut(cut_into_pieces):
    """A document alone and in company has the same bits: cuts depend on how much runs beside it."""
    q, k, v, g, _, _, _, _ = problem(3, 300, 2, 64, 64)
    low = [x.detach().to(DTYPE) for x in (q, k, v)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        together = lightning_forward(*low, g, None, None, 0.125, True)
        alone = lightning_forward(*(x[1:2] for x in low), g, None, None, 0.125, True)
        packed = [x.reshape(1, 900, 2, 64) for x in low]
        cut = torch.tensor([0, 300, 600, 900], dtype=torch.int32, device=DEVICE)
        in_a_row = lightning_forward(*packed, g, None, cut, 0.125, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(together[0][1:2], alone[0])
    assert torch.equal(together[1][1:2], alone[1])
    assert torch.equal(in_a_row[0][:, 300:600], alone[0])
    assert torch.equal(in_a_row[1], together[1])


def test_what_the_decay_erased_is_not_read(cut_into_pieces):
    """Rows behind the horizon of a piece may hold anything: at lam = 2^-4 a state remembers 8 tokens to 32 bits."""
    decay = -4 * math.log(2)
    q, k, v, g, _, _, _, _ = problem(1, 256, 1, 64, 64, decay=[decay])
    q, k, v = (x.detach().to(DTYPE) for x in (q, k, v))
    pieces = lightning_pieces.cut(torch.tensor([0, 256], device=DEVICE), 256, 128)
    k2 = k.clone()
    k2[:, :64] = float("nan")
    flat = [x.reshape(256, 64) for x in (k, v, k2)]
    states = [
        lightning_pieces.incoming_states(x, flat[1], g / math.log(2), pieces, 1, 1.0, None, reverse=False)
        for x in (flat[0], flat[2])
    ]
    assert torch.equal(*states)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 64), (2, 70), (2, 333)])
def test_states_of_whole_rows(monkeypatch, batch, tokens, reverse):
    """What ranks of a context-parallel group exchange, against the twins in FP64; rows are strided as slices of rows are."""
    monkeypatch.setattr(lightning_kernels, "ROW_PIECE", 64)
    q, k, v, g, _, _, _, _ = problem(batch, tokens + 5, 2, 64, 64, decay=[-0.9, -2e-4])
    twin, first = (state_before, q) if reverse else (state_after, k)
    a, c = (x.detach()[:, 2 : 2 + tokens] for x in (first, v))
    found = lightning_kernels.row_states(a.to(DTYPE), c.to(DTYPE), g, reverse=reverse)
    close("states", found, twin(a, c, g.double()), tokens)


def test_pieces_cover_every_document_once():
    bounds = torch.tensor([0, 0, 70, 70, 100, 300, 300])
    pieces = lightning_pieces.cut(bounds, 300, 64)
    assert pieces.bounds.tolist() == [0, 0, 64, 70, 70, 100, 164, 228, 292, 300, 300]
    assert pieces.document.tolist() == [0, 1, 1, 2, 3, 4, 4, 4, 4, 5]
    assert pieces.first.tolist() == [0, 1, 3, 4, 5, 9]
    assert pieces.last.tolist() == [0, 2, 3, 4, 8, 9]


def test_decays_from_none_to_total():
    check(1, 150, 5, 64, 64, initial=True, decay=[-1e-6, -0.9, -5.0, -80.0, -300.0])


def test_no_tokens():
    q, k, v, g, state, _, _, dfinal = problem(2, 0, 2, 64, 64, initial=True)
    low = [x.detach().to(DTYPE) for x in (q, k, v)]
    out, final = lightning_forward(*low, g, state.detach().float(), None, 1.0, True)
    assert out.shape == v.shape
    assert torch.equal(final, state.detach().float())
    assert torch.equal(lightning_backward(out, dfinal.float(), *low, g, state.float(), None, 1.0)[3], dfinal.float())


def test_rows_of_other_documents_never_leak(monkeypatch):
    """NaN in the neighbours, in what follows the last document and in fresh memory stays out of a document's results."""
    q, k, v, g, _, _, dout, _ = problem(1, 230, 2, 64, 64)
    low = [x.detach().to(DTYPE) for x in (q, k, v, dout)]
    alone = [x[:, 100:170].clone() for x in low]
    for x in low:
        x[:, :100] = float("nan")
        x[:, 170:] = float("nan")
    cut = torch.tensor([0, 100, 170, 200], dtype=torch.int32, device=DEVICE)
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: make(*a, **kw).fill_(float("nan")))
    for result, expected in (
        (lightning_forward(*low[:3], g, None, cut, 0.125, True), lightning_forward(*alone[:3], g, None, None, 0.125, True)),
        (
            lightning_backward(low[3], None, *low[:3], g, None, cut, 0.125),
            lightning_backward(alone[3], None, *alone[:3], g, None, None, 0.125),
        ),
    ):
        for got, wanted in zip(result, expected, strict=True):
            part = got[1:2] if got.dim() == 4 and got.shape[0] == 3 else got[:, 100:170] if got.shape[0] == 1 else got
            assert torch.equal(part, wanted)


def test_views_of_one_projection_are_read_in_place():
    qkv = torch.randn(2, 70, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    g = log_decay(2, 0, 4).to(DEVICE)
    views = qkv.unbind(2)
    packed = [x.contiguous() for x in views]
    in_place = lightning_forward(*views, g, None, None, 1.0, True)
    copied = lightning_forward(*packed, g, None, None, 1.0, True)
    for got, wanted in zip(in_place, copied, strict=True):
        assert torch.equal(got, wanted)


def test_operators_are_sound():
    """Fake shapes, gradient registration and absence of aliasing, by torch's own checker."""
    q, k, v, g, state, _, _, _ = problem(1, 70, 2, 64, 64, initial=True)
    leaves = [x.detach().to(DTYPE).requires_grad_() for x in (q, k, v)]
    first = state.detach().float().requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(lightning_forward, (*leaves, g, first, None, 0.125, True), test_utils=checks)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("batch", "cuts"), [(3, None), (1, [0, 1, 64, 64, 700, 1027, 4000])])
def test_long_sequences_on_gpu(dim, batch, cuts):
    check(batch, 4000, 4, dim, dim, cu_seqlens=cuts, initial=True)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_runs_repeat_bit_for_bit_and_in_a_graph():
    q, k, v, g, state, _, dout, _ = problem(2, 1000, 8, 128, 128, initial=True)
    low = [x.detach().to(DTYPE) for x in (q, k, v)]
    first = state.detach().float()

    def both():
        forward = lightning_forward(*low, g, first, None, 0.1, True)
        return (*forward, *lightning_backward(dout.to(DTYPE), None, *low, g, first, None, 0.1))

    expected = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(both(), expected, strict=True))
