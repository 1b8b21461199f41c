"""Batch-invariant mode: a request's log-probabilities are the same bits alone and among others."""

import pytest
import tiny_engine as tiny
import torch

from openling.ops.rows import exp_rows, fixed_bmm, fixed_linear, sigmoid_rows, silu_rows


def exact(outputs):
    return [(p.token_id, p.logprob, p.sampled) for output in outputs for p in output.logprobs]


@pytest.mark.parametrize("kind", ["hybrid", "gqa", "half", "moe"])
def test_alone_and_among_others(kind):
    m = tiny.model(kind, dtype=torch.float32)
    prompts = [tiny.prompt(n) for n in (1, 40, 130, 600, 77)]

    def requests():
        return [tiny.request(ids, max_tokens=12, temperature=1.0, seed=i, logprobs=1) for i, ids in enumerate(prompts)]

    def fresh(**changes):
        return tiny.engine(m, deterministic=True, step_tokens=700, **changes)

    alone = []
    for r in requests():
        alone.append(exact(tiny.run(fresh(), [r])[r.id]))
    for order in (slice(None), slice(None, None, -1)):
        together = requests()
        found = tiny.run(fresh(), together[order])
        assert [exact(found[r.id]) for r in together] == alone
    together = requests()
    e = fresh(pages=16, max_running=3)
    found = tiny.run(e, together)
    assert [exact(found[r.id]) for r in together] == alone
    assert not torch.are_deterministic_algorithms_enabled()


def test_blocks_of_rows():
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(3, 43, 8, generator=g), torch.randn(5, 8, generator=g), torch.randn(5, generator=g)
    assert torch.allclose(fixed_linear(x, w, b), torch.nn.functional.linear(x, w, b), atol=1e-5)
    assert torch.equal(fixed_linear(x, w)[1, 7], fixed_linear(x[1:2, 7:8], w)[0, 0])
    heads = torch.randn(3, 8, 5, generator=g)
    assert torch.allclose(fixed_bmm(x, heads), x @ heads, atol=1e-5)
    assert torch.equal(fixed_bmm(x, heads)[:, 20], fixed_bmm(x[:, 20:21], heads)[:, 0])


@pytest.mark.parametrize("function", [silu_rows, sigmoid_rows, exp_rows])
@pytest.mark.parametrize("threads", [1, 3])
def test_numbers_do_not_depend_on_their_place(function, threads):
    x = torch.randn(1, generator=torch.Generator().manual_seed(1)).expand(70_001).clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        assert len(function(x).unique()) == 1
        assert torch.equal(function(x[:13]), function(x)[:13])
        assert function(x[:0]).shape == (0,)
        assert torch.allclose(function(x.view(1, -1, 1)), function(x.double()).float().view(1, -1, 1))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
