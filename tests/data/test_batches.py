"""Rows keep documents apart, every epoch reads every window once, and a batch depends on its number and not on ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.data.batches import NO_TARGET, BatchSource, MemoryBatches, MemoryStream, Windows, check_fingerprint
from openling.data.order import Shares, shuffled
from openling.errors import UserError

END = 0


def corpus(lengths):
    """Documents whose tokens are all different, so that every token says where it is from; END after each."""
    first = np.cumsum([1, *lengths])
    return [np.r_[np.arange(a, a + n), END] for a, n in zip(first, lengths, strict=False)]


LENGTHS = st.lists(st.integers(0, 20), min_size=3, max_size=20).filter(lambda x: sum(x) >= 12)


@given(count=st.integers(1, 300), key=st.integers())
def test_a_shuffle_is_a_permutation_and_the_same_piece_by_piece(count, key):
    whole = shuffled(np.arange(count), count, key)
    assert sorted(whole.tolist()) == list(range(count))
    assert [int(shuffled(np.array([i]), count, key)[0]) for i in range(min(count, 5))] == whole[:5].tolist()


def test_a_shuffle_spreads_evenly():
    # Where index 0 goes under 3000 keys: chi-square with 9 degrees of freedom is below 27.9 in 999 of 1000 shuffles.
    counts = np.bincount([int(shuffled(np.array([0]), 10, k)[0]) for k in range(3000)], minlength=10)
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.9


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12), rows=st.integers(1, 4), step=st.integers(0, 9), seed=st.integers(0, 5))
def test_bounds_and_targets_are_those_of_the_documents(lengths, length, rows, step, seed):
    batch = MemoryBatches(corpus(lengths), length=length, rows=rows, seed=seed).batch(step)
    ids, targets = batch.flat_ids[0].tolist(), batch.flat_targets[0].tolist()
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == rows * length and set(range(0, rows * length, length)) < set(bounds)
    assert bounds == sorted(set(bounds)) and batch.cu_seqlens.dtype == torch.int32
    last = set(np.cumsum(lengths)[np.asarray(lengths) > 0].tolist())
    for i, (token, target) in enumerate(zip(ids, targets, strict=True)):
        if token == END:  # nothing is predicted across documents, and one begins here
            assert target == NO_TARGET and i + 1 in bounds
        else:
            assert target == (END if token in last else token + 1)
            if i + 1 < len(ids) and i + 1 not in bounds:
                assert ids[i + 1] == target


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12), epoch=st.integers(0, 3))
def test_an_epoch_reads_every_window_once(lengths, length, epoch):
    windows = Windows(MemoryStream(corpus(lengths)), length, "key")
    places = windows.places(np.arange(epoch * windows.count, (epoch + 1) * windows.count))
    total = sum(lengths) + len(lengths)
    seen = [(p + i) % total for p in places.tolist() for i in range(length)]
    assert len(seen) == len(set(seen)) > total - length


def test_epochs_differ_and_seeds_differ():
    text = corpus([50] * 40)
    batches = MemoryBatches(text, length=16, rows=4)
    steps = len(range(sum(len(d) for d in text) // 16 // 4))
    assert not torch.equal(batches.batch(0).ids, batches.batch(steps).ids)
    other = MemoryBatches(text, length=16, rows=4, seed=1)
    assert not torch.equal(batches.batch(0).ids, other.batch(0).ids) and batches.fingerprint() != other.fingerprint()


@settings(max_examples=30, deadline=None)
@given(world=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 50))
def test_ranks_share_one_global_batch(world, step):
    def read(**how):
        return MemoryBatches(corpus([9] * 30), length=8, rows=12, **how)

    parts = [read(rank=r, world=world) for r in range(world)]
    assert torch.equal(torch.cat([p.batch(step).ids for p in parts]), read().batch(step).ids)
    assert len({p.fingerprint() for p in parts} | {read().fingerprint()}) == 1
    assert {p.tokens_per_step for p in parts} == {96} and isinstance(parts[0], BatchSource)


def test_a_batch_splits_into_whole_rows():
    batch = MemoryBatches(corpus([5, 9, 3, 30]), length=8, rows=4).batch(3)
    parts = batch.split(2)
    assert torch.equal(torch.cat([p.ids for p in parts]), batch.ids)
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    moved = [p.cu_seqlens + 16 * i for i, p in enumerate(parts)]
    assert torch.cat([moved[0][:-1], moved[1]]).tolist() == batch.cu_seqlens.tolist()
    with pytest.raises(UserError, match="multiple of 3"):
        batch.split(3)


def test_the_model_sees_no_further_than_a_document():
    from openling.model.config import ModelConfig
    from openling.model.ling import Ling

    config = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, layer_kinds=("lightning", "gqa"), group_norm_size=2, qk_nope_head_dim=8, v_head_dim=8, qk_rope_head_dim=8,
        kv_lora_rank=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Ling(config).double().eval()
    batch = MemoryBatches(corpus([5, 9, 3, 30]), length=8, rows=3).batch(0)
    with torch.no_grad():
        together = model(batch.flat_ids, cu_seqlens=batch.cu_seqlens)
        for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            torch.testing.assert_close(together[:, a:b], model(batch.flat_ids[:, a:b]), rtol=0, atol=1e-6)


def test_wrong_requests_are_refused():
    text = corpus([5, 5])
    with pytest.raises(UserError, match="too short"):
        MemoryBatches(text, length=13, rows=1)
    with pytest.raises(UserError, match="multiple of 2 ranks"):
        MemoryBatches(text, length=4, rows=3, world=2)
    with pytest.raises(UserError, match="no such rank"):
        MemoryBatches(text, length=4, rows=2, world=2, rank=2)
    with pytest.raises(UserError, match="differ from those"):
        check_fingerprint(MemoryBatches(text, length=4, rows=2), MemoryBatches(text, length=5, rows=2).fingerprint())


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=30), draws=st.integers(0, 400), key=st.integers())
def test_shares_are_exact_at_every_moment(weights, draws, key):
    shares = Shares(weights, key=key)
    counts = [0] * len(weights)
    for draw in range(draws):
        part, before = shares.deal(draw)
        assert before == counts[part]
        counts[part] += 1
    assert shares.dealt(draws) == counts and sum(counts) == draws
    assert all(abs(c - draws * w / sum(weights)) < 4 for c, w in zip(counts, weights, strict=True))


def test_decimal_weights_are_exact():
    assert Shares([0.46, 0.5, 0.04]).dealt(100_000_000) == [46_000_000, 50_000_000, 4_000_000]
