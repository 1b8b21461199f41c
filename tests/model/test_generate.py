"""Generation against full re-computation, the sampling filters against transformers'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from openling.errors import UserError
from openling.model import generate as module
from openling.model.config import ModelConfig
from openling.model.generate import Sampling, decode, filter_logits, generate, prefill
from openling.model.ling import Ling


def tiny(seed=0, **changes):
    """All three kinds of layers; weights large enough that greedy continuations vary."""
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_kinds=("gqa", "lightning", "mla", "lightning"),
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        initializer_range=0.3,
    ).replace(**changes)
    model = Ling(config).double()
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def prompt(batch, tokens, seed=0):
    return torch.randint(61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def recomputed(model, ids, steps):
    """Greedy without a cache: the whole sequence again for each token."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[:, -steps:].tolist()


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 20), chunk=st.integers(1, 7), seed=st.integers(0, 99))
@torch.no_grad()
def test_greedy_equals_full_recomputation(batch, tokens, chunk, seed):
    model, ids = tiny(seed), prompt(batch, tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PREFILL_CHUNK", chunk)
        assert generate(model, ids, Sampling(max_new_tokens=6), stop_ids=()) == recomputed(model, ids, 6)


@torch.inference_mode()
def test_cached_logits_equal_uncached(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_CHUNK", 5)
    model, ids = tiny(), prompt(2, 23)
    cache = model.new_cache()
    found = [prefill(model, ids[:, :17], cache)] + [model(ids[:, t : t + 1], cache=cache)[:, -1] for t in range(17, 23)]
    # FP64; only the order of sums differs.
    torch.testing.assert_close(torch.stack(found, 1), model(ids)[:, 16:], rtol=1e-9, atol=1e-9)


def test_left_padded_batch_equals_single_sequences(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_CHUNK", 4)
    model, short, long = tiny(), prompt(1, 6, seed=1), prompt(1, 11, seed=2)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :5] = 0
    for sampling in (Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, repetition_penalty=1.5)):
        alone = [generate(model, ids, sampling, stop_ids=())[0] for ids in (short, long)]
        assert generate(model, torch.cat((padded, long)), sampling, stop_ids=(), attention_mask=mask) == alone


def test_each_sequence_stops_by_itself():
    model, ids = tiny(), prompt(3, 9)
    free = generate(model, ids, Sampling(max_new_tokens=12), stop_ids=())
    stop = free[1][3]
    seen = []
    found = generate(
        model, ids, Sampling(max_new_tokens=12), stop_ids={stop}, on_token=lambda row, token: seen.append((row, token))
    )
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert found == expected
    assert len(found[1]) <= 4
    assert [[token for row, token in seen if row == i] for i in range(3)] == expected


def test_no_step_runs_after_all_have_stopped():
    model, ids = tiny(), prompt(1, 5)
    first = generate(model, ids, Sampling(max_new_tokens=1), stop_ids=())[0]
    assert list(decode(model, ids, Sampling(max_new_tokens=50), stop_ids=set(first))) == [first]
    assert generate(model, ids, Sampling(max_new_tokens=0), stop_ids=()) == [[]]


@settings(max_examples=40, deadline=None)
@given(
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_filters_equal_those_of_transformers(temperature, top_k, top_p, min_p, seed):
    logits = 3 * torch.randn(3, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = logits / temperature
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    found = filter_logits(logits, Sampling(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(found, expected)


def test_repetition_penalty_equals_that_of_transformers():
    ids, logits = prompt(2, 7), torch.randn(2, 61, generator=torch.Generator().manual_seed(1))
    found = module._Seen(ids, None, 61).penalise(logits, 1.3)
    torch.testing.assert_close(found, RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()))


@torch.no_grad()
def test_sampling_follows_the_distribution_and_the_seed():
    model, ids = tiny(), prompt(1, 4).expand(1500, -1)
    sampling = Sampling(temperature=0.7, seed=3, max_new_tokens=1)
    drawn = generate(model, ids, sampling, stop_ids=())
    assert generate(model, ids, sampling, stop_ids=()) == drawn
    share = torch.tensor(drawn).flatten().bincount(minlength=61) / 1500
    expected = (model(ids[:1])[0, -1] / 0.7).softmax(-1)
    # 1500 draws: a share has a standard deviation of at most sqrt(0.25 / 1500) = 0.013; five of them.
    assert float((share - expected).abs().max()) < 0.065


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": -1}]
)
def test_senseless_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="empty"):
        generate(tiny(), torch.empty(1, 0, dtype=torch.long), Sampling(), stop_ids=())
