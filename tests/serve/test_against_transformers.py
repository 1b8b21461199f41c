"""Greedy replies equal transformers' `generate` on the exported folder: 200 random prompts of random lengths, in every way."""

import random

import pytest
import tiny_engine as tiny
import torch
import transformers

from openling.weights.export import save

COUNT, NEW = 200, 10
CONFIG = tiny.KINDS["moe"].replace(layer_kinds=("gqa", "lightning", "mla"), num_nextn_predict_layers=1, q_lora_rank=12)


def random_prompts():
    """Some share a beginning, so that a prefix cache has something to do."""
    rng = random.Random(0)
    stems = [tiny.prompt(n) for n in (64, 100, 150)]
    prompts = []
    for i in range(COUNT):
        stem = rng.choice(stems) if rng.random() < 0.4 else ()
        prompts.append((*stem[: rng.randint(0, 150)], *tiny.prompt(rng.randint(1, 120), seed=i)))
    return prompts


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The model, the prompts, and what transformers says behind them (left-padded batches)."""
    m = tiny.model_of(CONFIG)
    folder = save(m, tmp_path_factory.mktemp("exported") / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    prompts = random_prompts()
    replies = []
    for start in range(0, COUNT, 50):
        batch = prompts[start : start + 50]
        longest = max(len(ids) for ids in batch)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        replies += out[:, longest:].tolist()
    return m, prompts, replies


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"max_running": 16}, COUNT),
        ({"prefix_cache": False, "step_tokens": 90, "max_running": 16}, COUNT),
        ({"drafts": 2, "draft_always": True, "step_tokens": 100, "max_running": 16}, COUNT),
        ({"pages": 12, "slots": 6, "max_running": 5}, COUNT),
        ({"max_running": 1}, 40),
    ],
    ids=["batched", "uncached, small chunks", "drafts", "scarce memory", "one by one"],
)
def test_200_prompts(known, settings, count):
    m, prompts, replies = known
    e = tiny.engine(m, **settings)
    requests = [tiny.request(ids, max_tokens=NEW) for ids in prompts[:count]]
    found = tiny.run(e, requests)
    assert [tiny.tokens(found[r.id]) for r in requests] == replies[:count]
    assert (e.stats().cached_tokens > 0) == settings.get("prefix_cache", True)
