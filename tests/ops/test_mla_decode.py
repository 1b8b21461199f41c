"""Absorbed MLA decoding over pages: the kernels against a softmax written out in FP64.

The error of an output is bounded from the sizes of its own terms: out = sum of p c, so |error| <= e (sum of p |c| + |out|), where
e is the rounding of the weights p (and of the output). In BF16 (8 bits) e = 2^-8; scores are FP32 sums of exact products, and
10 % more pays for them. In FP32 (Triton's interpreter) e is about 2^-24 times the number of terms of a score; 2^-16 is ample
for 200.
"""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from openling.ops.attention import absorbed_attention, paged_absorbed_attention
from openling.ops.kernels import mla

PAGE = 64
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies BF16 matrices wrongly; on a GPU the kernels never see FP32.
DTYPE, ROUNDING = (torch.bfloat16, 1.1 * 2**-8) if GPU else (torch.float32, 2**-16)
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""

    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


class Pages:
    """Sequences of random rows in pages in random order; every row that no sequence owns is NaN."""

    def __init__(self, lengths, rank, rope, seed=0, dtype=None, spare=2):
        generator = torch.Generator().manual_seed(seed)
        dtype = dtype or DTYPE
        most = max(1, max(-(-n // PAGE) for n in lengths))
        order = torch.randperm(len(lengths) * most + spare, generator=generator)
        table = order[: len(lengths) * most].view(len(lengths), most)
        pages = torch.full((len(order), PAGE, rank + rope), float("nan"), dtype=dtype)
        self.rows = []
        for n, own in zip(lengths, table, strict=True):
            rows = torch.randn(n, rank + rope, generator=generator).to(dtype)
            self.rows.append(rows.to(DEVICE))
            for i in range(-(-n // PAGE)):
                part = rows[i * PAGE : (i + 1) * PAGE]
                pages[own[i], : len(part)] = part
        self.rank = rank
        self.pages, self.table = pages.to(DEVICE), table.int().to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    @property
    def arguments(self):
        return self.pages[..., : self.rank], self.pages[..., self.rank :], self.table, self.lengths


def queries(batch, new, heads, rank, rope, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, new, heads, d, generator=generator).to(DEVICE, DTYPE) for d in (rank, rope)]


def written_out(q_latent, q_rope, rows, rank, scale):
    """Context and sum of p |c|, [B, T, H, R] in FP64; a token that sees no key has zeros."""
    out, size = (torch.zeros(q_latent.shape, dtype=torch.float64, device=DEVICE) for _ in range(2))
    new = q_latent.shape[1]
    query = torch.cat((q_latent, q_rope), dim=-1).double()
    for b, t in product(range(len(rows)), range(new)):
        seen = rows[b][: max(0, len(rows[b]) - new + 1 + t)].double()
        if len(seen):
            p = (scale * query[b, t] @ seen.T).softmax(-1)
            out[b, t], size[b, t] = p @ seen[:, :rank], p @ seen[:, :rank].abs()
    return out, size


def assert_right(found, q_latent, q_rope, rows, rank, scale):
    expected, size = written_out(q_latent, q_rope, rows, rank, scale)
    assert torch.isfinite(found).all()
    assert ((found.double() - expected).abs() <= ROUNDING * (size + expected.abs())).all()


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.sampled_from((0, 1, 3, 63, 64, 65, 128, 150, 200)), min_size=1, max_size=4)


@settings(max_examples=12 if GPU else 8, deadline=None)
@given(
    lengths=LENGTHS,
    new=st.integers(1, 4),
    heads=st.sampled_from((4, 17, 32)),
    rank=st.sampled_from((32, 48)),
    split=st.sampled_from((0, 64, 128)),
    processors=st.sampled_from((1, 2, 5, 40)),
    seed=st.integers(0, 99),
)
def test_equals_softmax_written_out(lengths, new, heads, rank, split, processors, seed):
    """Any lengths in any pages, cut evenly or after every so many tokens, into fewer pieces than there are programs or more."""
    paged = Pages(lengths, rank, 16, seed=seed)
    q = queries(len(lengths), new, heads, rank, 16, seed=seed + 1)
    found = mla.run_decode(*q, *paged.arguments, 0.1, split, processors=processors)
    assert_right(found, *q, paged.rows, rank, 0.1)


@pytest.mark.parametrize("split", [0, 64])
def test_more_rows_than_a_block_and_strided_queries(split):
    """4 tokens x 64 heads; queries as a batched product over heads leaves them, [H, B, T, R]."""
    paged = Pages([70, 2], 32, 16)
    q_latent, q_rope = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in queries(2, 4, 64, 32, 16))
    found = mla.run_decode(q_latent, q_rope, *paged.arguments, 0.1, split)
    assert_right(found, q_latent, q_rope, paged.rows, 32, 0.1)


@pytest.mark.parametrize("tokens", [1, 64, 130])
@pytest.mark.parametrize("capacity", [0, 50])
def test_one_buffer_per_sequence(tokens, capacity):
    """The model's own cache: latents and rotated rows apart, views of larger buffers whose rest is NaN."""
    latent, rope = (torch.full((2, tokens + capacity, d), float("nan"), device=DEVICE, dtype=DTYPE) for d in (32, 16))
    rows = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    latent[:, :tokens], rope[:, :tokens] = rows[..., :32], rows[..., 32:]
    q = queries(2, 1, 8, 32, 16)
    found = mla.run_decode(*q, latent[:, :tokens], rope[:, :tokens], None, None, 0.1, processors=3)
    assert_right(found, *q, list(rows), 32, 0.1)


def test_large_scores_do_not_overflow():
    paged = Pages([100, 65], 32, 16)
    q = [50 * x for x in queries(2, 1, 4, 32, 16)]
    assert_right(mla.run_decode(*q, *paged.arguments, 1.0), *q, paged.rows, 32, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The same bits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [64, 128])
def test_a_fixed_cut_gives_a_sequence_the_same_bits_in_any_batch(split):
    """Alone, and in another row, other pages, beside shorter, longer and empty sequences, on more processors."""
    alone = Pages([190], 32, 16, seed=3)
    q = queries(1, 2, 4, 32, 16)
    expected = mla.run_decode(*q, *alone.arguments, 0.1, split, processors=2)
    batch = Pages([64, 0, 190, 400], 32, 16, seed=4, spare=9)
    for i, page in enumerate(alone.table[0, :3].tolist()):
        batch.pages[batch.table[2, i]] = alone.pages[page]
    many = queries(4, 2, 4, 32, 16, seed=5)
    for x, own in zip(many, q, strict=True):
        x[2] = own[0]
    found = mla.run_decode(*many, *batch.arguments, 0.1, split, processors=100)
    assert torch.equal(found[2], expected[0])


def test_repeats_bitwise():
    paged = Pages([200, 90], 32, 16)
    q = queries(2, 1, 4, 32, 16)
    first, second = (mla.run_decode(*q, *paged.arguments, 0.1, processors=5) for _ in range(2))
    assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------------------------
# The op and its twin
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 3])
def test_the_plain_paged_form_equals_the_contiguous_one(new):
    """In FP64, sequence by sequence; rows behind the end are NaN, and a sequence that is too short has zeros."""
    lengths, heads, nope, rope, value, rank = [70, 128, 1, 0], 3, 5, 4, 6, 7
    paged = Pages(lengths, rank, rope, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    q_nope, q_rope = (torch.randn(4, new, heads, d, generator=generator).double().to(DEVICE) for d in (nope, rope))
    kv_b = torch.randn(heads, nope + value, rank, generator=generator).double().to(DEVICE)
    found = paged_absorbed_attention(q_nope, q_rope, paged.pages, paged.table, paged.lengths, kv_b, nope, scale=0.3)
    for b, rows in enumerate(paged.rows):
        if len(rows) < new:
            assert not found[b, : new - len(rows)].any()
            continue
        latent, turned = rows[None, :, :rank], rows[None, :, rank:]
        expected = absorbed_attention(q_nope[b : b + 1], q_rope[b : b + 1], latent, turned, kv_b, nope, scale=0.3)
        assert (found[b] - expected[0]).abs().max() < 1e-12


def test_the_op_equals_its_twin_and_can_be_traced():
    paged = Pages([70, 5], 32, 16)
    q = queries(2, 2, 4, 32, 16)
    arguments = (*q, *paged.arguments, 0.1, 0)
    torch.library.opcheck(mla.mla_decode, arguments, test_utils=("test_schema", "test_faketensor"))
    # Up-projections that leave queries and context as they are turn the twin into the op.
    identity = torch.eye(32, device=DEVICE, dtype=torch.float64).repeat(4, 2, 1)
    twin = paged_absorbed_attention(
        q[0].double(), q[1].double(), paged.pages.double(), paged.table, paged.lengths, identity, 32, scale=0.1
    )
    expected, size = written_out(*q, paged.rows, 32, 0.1)
    assert (twin - expected).abs().max() < 1e-12
    assert ((mla.mla_decode(*arguments).double() - twin).abs() <= ROUNDING * (size + twin.abs())).all()


def test_bad_arguments_are_refused():
    paged = Pages([70], 32, 16)
    latent, rope, table, lengths = paged.arguments
    q = queries(1, 1, 4, 32, 16)
    with pytest.raises(ValueError, match="1 to 4 new tokens, got 5"):
        mla.run_decode(*queries(1, 5, 4, 32, 16), *paged.arguments, 0.1)
    with pytest.raises(ValueError, match="block table must be int32"):
        mla.run_decode(*q, latent, rope, table.long(), lengths, 0.1)
    with pytest.raises(ValueError, match="needs the lengths"):
        mla.run_decode(*q, latent, rope, table, None, 0.1)
    with pytest.raises(ValueError, match="split_tokens must be a multiple of the kernel's 64 keys, got 100"):
        mla.run_decode(*q, *paged.arguments, 0.1, 100)
    with pytest.raises(ValueError, match="page size must be a multiple"):
        mla.run_decode(*q, latent[:, :40], rope[:, :40], table, lengths, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Real shapes on a GPU: 512 + 64, the kernel for Hopper where this is one
# ---------------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("split", [0, 64, 1024])
@pytest.mark.parametrize(("new", "heads"), [(1, 64), (2, 64), (4, 64), (1, 32), (3, 32), (1, 16)])
def test_real_shapes(new, heads, split):
    lengths = [0, 1, 63, 64, 65, 127, 1000, 4096, 5001, 2]
    paged = Pages(lengths, 512, 64)
    q = queries(len(lengths), new, heads, 512, 64)
    found = mla.run_decode(*q, *paged.arguments, 192**-0.5, split)
    assert_right(found, *q, paged.rows, 512, 192**-0.5)


@needs_gpu
@pytest.mark.parametrize("config", mla.portable_candidates(512), ids=str)
def test_portable_kernel_at_real_shapes(config):
    lengths = [1, 64, 1001, 3000]
    paged = Pages(lengths, 512, 64)
    q = queries(len(lengths), 2, 64, 512, 64)
    try:
        found = mla.run_decode(*q, *paged.arguments, 192**-0.5, config=config)
    except mla.triton.runtime.errors.OutOfResources as error:
        pytest.skip(str(error))
    assert_right(found, *q, paged.rows, 512, 192**-0.5)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3, 40, 200])
def test_even_cuts_of_small_and_large_batches(batch):
    """Fewer and more sequences than processors, of equal and of very different lengths."""
    for lengths in ([777] * batch, [1 + (37 * i * i) % 2500 for i in range(batch)]):
        paged = Pages(lengths, 512, 64)
        q = queries(batch, 1, 64, 512, 64)
        assert_right(mla.run_decode(*q, *paged.arguments, 0.07), *q, paged.rows, 512, 0.07)


@needs_gpu
def test_one_buffer_per_sequence_at_real_shapes():
    """Views of a cache that has room for more, as `model.cache` hands them out."""
    latent, rope = (torch.full((3, 2000, d), float("nan"), device=DEVICE, dtype=DTYPE) for d in (512, 64))
    q = queries(3, 1, 64, 512, 64)
    for tokens in (1, 64, 999, 2000):
        rows = torch.randn(3, tokens, 576, device=DEVICE).to(DTYPE)
        latent[:, :tokens], rope[:, :tokens] = rows[..., :512], rows[..., 512:]
        found = mla.run_decode(*q, latent[:, :tokens], rope[:, :tokens], None, None, 0.07)
        assert_right(found, *q, list(rows), 512, 0.07)


@needs_gpu
def test_a_thousand_calls_agree_bitwise():
    """Warps that run at their own pace must not let a tile be overwritten, or read, too early."""
    lengths = [4000, 63, 900]
    paged = Pages(lengths, 512, 64)
    q = queries(3, 1, 64, 512, 64)
    first = mla.run_decode(*q, *paged.arguments, 0.07)
    others = [mla.run_decode(*q, *paged.arguments, 0.07) for _ in range(1000)]
    assert all(torch.equal(x, first) for x in others)


@needs_gpu
def test_a_captured_graph_serves_other_lengths():
    paged = Pages([3000, 100], 512, 64)
    q = queries(2, 1, 64, 512, 64)
    call = lambda: mla.mla_decode(*q, *paged.arguments, 0.07, 0)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in ([3000, 100], [1, 0], [65, 64]):
        paged.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        rows = [x[:n] for x, n in zip(paged.rows, lengths, strict=True)]
        assert_right(out, *q, rows, 512, 0.07)


@needs_gpu
def test_rows_beyond_two_to_the_31st_value():
    """Pages of 4.7 GB: the last one's offset needs 64 bits."""
    pages = 65536
    pool = torch.zeros(pages, PAGE, 576, device=DEVICE, dtype=DTYPE)
    rows = torch.randn(PAGE, 576, device=DEVICE).to(DTYPE)
    pool[-1] = rows
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([PAGE], dtype=torch.int32, device=DEVICE)
    q = queries(1, 1, 64, 512, 64)
    for config in (None, mla.portable_config(512)):
        found = mla.run_decode(*q, pool[..., :512], pool[..., 512:], table, lengths, 0.07, config=config)
        assert_right(found, *q, [rows], 512, 0.07)
