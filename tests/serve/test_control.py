"""What RL asks of the engine: log-probabilities, experts, versions, pauses, weights from outside."""

import pytest
import tiny_engine as tiny
import torch
from live_server import tiny_loaded

from openling.config.serve import ServeConfig
from openling.errors import UserError
from openling.model.paged import Sizes
from openling.serve.control import tensor_hash, weights
from openling.serve.engine_config import EngineConfig
from openling.serve.start import build_service
from openling.serve.types import Grammar


def changed(m, factor=1.1):
    return [(name, tensor.detach() * factor) for name, tensor in weights(m).items()]


def test_prompt_and_reply_logprobs_are_the_models():
    m, ids = tiny.model("half"), tiny.prompt(150)
    e = tiny.engine(m, step_tokens=70)
    r = tiny.request(ids, max_tokens=5, temperature=0.7, seed=1, logprobs=2, prompt_logprobs=3)
    outputs = tiny.run(e, [r])[r.id]
    reply = tiny.tokens(outputs)
    logp = tiny.log_probabilities(m, [*ids, *reply])
    warm = tiny.log_probabilities(m, [*ids, *reply], temperature=0.7)
    prompt = outputs[0].prompt_logprobs
    assert prompt[0] is None
    assert [p.token_id for p in prompt[1:]] == list(ids[1:])
    assert [p.logprob for p in prompt[1:]] == pytest.approx([logp[i - 1, t].item() for i, t in enumerate(ids) if i], abs=1e-5)
    assert [len(p.top) for p in prompt[1:]] == [3] * 149
    assert all(o.prompt_logprobs is None for o in outputs[1:])
    found = [p for o in outputs for p in o.logprobs]
    at = range(len(ids) - 1, len(ids) + 4)
    assert [p.logprob for p in found] == pytest.approx([logp[i, t].item() for i, t in zip(at, reply, strict=True)], abs=1e-5)
    assert [p.sampled for p in found] == pytest.approx([warm[i, t].item() for i, t in zip(at, reply, strict=True)], abs=1e-5)


@pytest.mark.parametrize("drafts", [0, 2])
def test_routed_experts_of_every_context_token_once(drafts):
    m = tiny.model("moe") if not drafts else tiny.model_of(tiny.KINDS["moe"].replace(num_nextn_predict_layers=1))
    e = tiny.engine(m, step_tokens=50, drafts=drafts, draft_always=True)
    ids = tiny.prompt(120)
    asked, other = tiny.request(ids, max_tokens=6, routed_experts=True), tiny.request(tiny.prompt(40), max_tokens=9)
    found = tiny.run(e, [other, asked])
    assert found[other.id][0].routed_experts is None
    experts = [token for output in found[asked.id] for token in output.routed_experts]
    context = [*ids, *tiny.tokens(found[asked.id])][:-1]  # the last token is sampled, not computed
    layers = [layer.mlp for layer in m.model.layers[:3] if hasattr(layer.mlp, "experts")]
    for layer in layers:
        layer.chosen = []
    with torch.no_grad():
        m(torch.tensor([context]))
    expected = torch.stack([layer.chosen[0] for layer in layers], dim=1)
    assert torch.equal(torch.tensor(experts).sort(-1).values, expected.sort(-1).values)


def test_a_pause_keeps_what_was_made_and_a_reply_spans_versions():
    m, ids = tiny.model("hybrid"), tiny.prompt(100)
    e = tiny.engine(m, weight_version="one")
    r = tiny.request(ids, max_tokens=20)
    e.add(r)
    outputs = [output for _ in range(10) for output in e.step()]
    made = tiny.tokens(outputs)
    e.pause()
    assert not e.has_work()
    assert e.step() == []
    assert e.stats().paused == 1
    e.update_weights("two", changed(m))
    e.resume()
    outputs += tiny.drain(e)[r.id]
    assert [o.weight_version for o in outputs] == ["one"] * len(made) + ["two"] * (20 - len(made))
    # What the new weights say to prompt and the old weights' tokens: nothing computed with the old ones is left.
    assert tiny.tokens(outputs) == made + tiny.expected(m, (*ids, *made), 20 - len(made))


def test_a_pause_that_aborts_ends_every_reply():
    e = tiny.engine(tiny.model())
    requests = [tiny.request(tiny.prompt(n), max_tokens=50) for n in (5, 90)]
    for r in requests:
        e.add(r)
    e.step()
    ended = e.pause("abort")
    assert {o.request_id: o.finish_reason for o in ended} == {r.id: "abort" for r in requests}
    e.check_integrity()
    assert e.stats().running == 0


def test_cached_prefixes_of_old_weights_are_never_used():
    m, ids = tiny.model("hybrid"), tiny.prompt(130)
    e = tiny.engine(m)
    tiny.run(e, [tiny.request(ids)])
    e.update_weights("two", changed(m))
    r = tiny.request(ids)
    found = tiny.run(e, [r])[r.id]
    assert found[0].cached_tokens == 0
    assert tiny.tokens(found) == tiny.expected(m, ids, 8)


def test_an_update_that_does_not_fit_changes_nothing():
    m = tiny.model()
    e = tiny.engine(m, weight_version="one")
    before, tensors = e.checksum(), dict(changed(m))
    name = "lm_head.weight"
    wrong = {
        "no such weight": ("lm_head.wieght", tensors[name]),
        "does not fit": (name, tensors[name][:-1]),
        "does not fit ": (name, tensors[name].float()),
    }
    for message, pair in wrong.items():
        with pytest.raises(UserError, match=message.strip()):
            e.update_weights("two", [*changed(m)[:3], pair])
    with pytest.raises(UserError, match="twice"):
        e.update_weights("two", [(name, tensors[name])] * 2)
    with pytest.raises(UserError, match="damaged"):
        e.update_weights("two", [(name, tensors[name])], hashes={name: tensor_hash(tensors[name] + 1)})
    assert (e.checksum(), e.weight_version) == (before, "one")
    e.update_weights("two", [(name, tensors[name])], hashes={name: tensor_hash(tensors[name])})
    assert torch.equal(e.get_weight(name), tensors[name])
    assert e.checksum() != before
    assert e.stats().weight_version == "two"


def test_memory_is_given_back_and_taken_again():
    m, ids = tiny.model("mtp"), tiny.prompt(100)
    e = tiny.engine(m, drafts=2, draft_always=True)
    r = tiny.request(ids, max_tokens=20)
    e.add(r)
    outputs = [output for _ in range(4) for output in e.step()]
    e.release_memory()
    assert not e.store.rows
    assert not e.store.states.numel()
    with pytest.raises(UserError, match="given its memory back"):
        e.resume()
    e.restore_memory()
    e.resume()
    outputs += tiny.drain(e)[r.id]
    assert tiny.tokens(outputs) == tiny.expected(m, ids, 20)


def test_taking_back_what_was_never_given_changes_nothing():
    m, ids = tiny.model("mtp"), tiny.prompt(100)
    e = tiny.engine(m)
    r = tiny.request(ids, max_tokens=20)
    e.add(r)
    outputs = [output for _ in range(4) for output in e.step()]
    e.restore_memory()
    outputs += tiny.drain(e)[r.id]
    assert tiny.tokens(outputs) == tiny.expected(m, ids, 20)


def test_engines_that_cannot_be():
    m = tiny.model("mtp")
    with pytest.raises(UserError, match="max_position_embeddings"):
        tiny.engine(m, max_model_len=1025)
    with pytest.raises(UserError, match="cannot draft"):
        tiny.engine(m, drafts=1, deterministic=True)
    with pytest.raises(UserError, match="0 to 3"):
        tiny.engine(m, drafts=4)
    with pytest.raises(UserError, match="1 or more"):
        tiny.engine(m, max_running=0)
    with pytest.raises(UserError, match="holds no page"):
        tiny.engine(m, pages=None, memory_bytes=1000)
    assert tiny.engine(m, pages=3).max_model_len == 192
    budget = tiny.engine(m, pages=None, slots=2, memory_bytes=10**6)
    sizes = Sizes.of(m.config, torch.float64, 0)
    held = sum(x.nbytes for x in (budget.store.states, *budget.store.rows.values()))
    assert held == 3 * sizes.slot + (budget.store.pages + 1) * sizes.page
    assert held <= 10**6 < held + sizes.page


def test_refusals_name_the_numbers():
    e = tiny.engine(tiny.model())
    with pytest.raises(UserError, match="60"):
        e.add(tiny.request((3, 61)))
    with pytest.raises(UserError, match="1020 prompt tokens"):
        e.add(tiny.request(tiny.prompt(1020), max_tokens=9))
    with pytest.raises(UserError, match="empty"):
        e.add(tiny.request(()))
    with pytest.raises(UserError, match="tokenizer"):
        e.add(tiny.request((1,), grammar=Grammar("json_object")))
    with pytest.raises(UserError, match="vocabulary|no such token"):
        e.add(tiny.request((1,), logit_bias={99: 1.0}))
    assert not e.has_work()
    r = tiny.request((1, 2))
    e.add(r)
    with pytest.raises(UserError, match="of this id"):
        e.add(r)


def test_drafts_need_a_layer_that_drafts():
    with pytest.raises(UserError, match="no MTP layer"):
        build_service(tiny_loaded(), EngineConfig(drafts=2, pages=8, slots=4, max_running=2), ServeConfig())
