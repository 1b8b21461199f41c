"""On a GPU: kernels and CUDA graphs give the tokens of eager steps, of `generate`, and of a lone request."""

import pytest
import tiny_engine as tiny
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

WIDE = {"hidden_size": 128, "head_dim": 32, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
KINDS = ("hybrid", "gqa", "half", "mtp")


def on_gpu(kind):
    m = tiny.model_of(tiny.KINDS[kind].replace(**WIDE), dtype=torch.float32)
    return m.to("cuda", torch.bfloat16)


def replies(m, prompts, **settings):
    """Log-probabilities and tokens; FP32 noise of BF16 products may tip near-equal tokens, so few are compared."""
    e = tiny.engine(m, **settings)
    requests = [tiny.request(ids, max_tokens=40, temperature=1.0, seed=i, logprobs=0) for i, ids in enumerate(prompts)]
    found = tiny.run(e, requests)
    return e, [[(p.token_id, p.logprob) for output in found[r.id] for p in output.logprobs] for r in requests]


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_replay_what_eager_steps_compute(kind):
    m = on_gpu(kind)
    prompts = [tiny.prompt(n) for n in (1, 60, 64, 100, 150)]
    drafts = {"drafts": 3, "draft_always": True} if kind == "mtp" else {}
    captured, fast = replies(m, prompts, **drafts)
    eager, slow = replies(m, prompts, eager=True, **drafts)
    assert captured.runner.graphs is not None
    assert captured.runner.graphs._graphs
    assert kind == "mtp" or captured.runner.ragged_graphs._graphs
    assert eager.runner.graphs is None
    # The same kernels on the same rows; a graph pads its batch, which may change a matrix product's last bit.
    for a, b in zip(fast, slow, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x[0] != y[0]), len(a))
        assert same >= 5
        assert [p for _, p in a[:same]] == pytest.approx([p for _, p in b[:same]], abs=0.1)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_batch_invariant_to_the_bit(kind):
    m = on_gpu(kind)
    prompts = [tiny.prompt(n) for n in (5, 70, 130)]
    _, together = replies(m, prompts, deterministic=True)
    for i, ids in enumerate(prompts):
        e = tiny.engine(m, deterministic=True)
        r = tiny.request(ids, max_tokens=40, temperature=1.0, seed=i, logprobs=0)
        alone = [(p.token_id, p.logprob) for output in tiny.run(e, [r])[r.id] for p in output.logprobs]
        assert alone == together[i]


def test_a_width_without_kernels_runs_eagerly():
    m = tiny.model_of(tiny.KINDS["hybrid"], dtype=torch.float32).to("cuda", torch.bfloat16)
    e, _ = replies(m, [tiny.prompt(70)])
    assert e.runner.graphs is None
