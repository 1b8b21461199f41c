"""The model: one function by prefill, chunks and single tokens; packing, padding, MTP; mixers against formulas; bad configs.

FP64 models: their RoPE tables stay FP32, but equal positions read equal tables, so the forms of a call differ by rounding only
(measured: below 1e-12 of the largest logit; 1e-9 allowed). Left padding moves positions, and FP32 angles near 20 are rounded to
1e-6, which a few layers amplify: 1e-4.
"""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.errors import UserError
from openling.model.config import ModelConfig, read_ling, write_ling
from openling.model.families import read_config
from openling.model.ling import CallContext, GroupedQueryAttention, LatentAttention, LightningAttention, Ling, Rope
from openling.ops.lightning import log_decay

ROUNDING = 1e-9
VOCAB = 37
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config(kinds=("gqa", "lightning", "mla"), **changes) -> ModelConfig:
    return ModelConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": len(kinds),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_kinds": tuple(kinds),
            "group_norm_size": 2,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "partial_rotary_factor": 0.5,
        }
        | changes
    )


EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 6,
    "moe_shared_expert_intermediate_size": 6,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
}


@torch.no_grad()
def build(c: ModelConfig, seed=0, dtype=torch.float64) -> Ling:
    """Every tensor random, norms and biases too; matrices keep the scale of their inputs."""
    g = torch.Generator().manual_seed(seed)
    model = Ling(c)
    for name, x in model.state_dict().items():
        noise = torch.randn(x.shape, generator=g)
        if x.dim() >= 2:
            x.copy_(noise if "embeddings" in name else noise / x.shape[-1] ** 0.5)
        else:
            x.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.to(dtype).eval()


def tokens(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@st.composite
def hybrids(draw) -> ModelConfig:
    """Any mixture of layer kinds, biases, experts, rotations and query ranks."""
    kinds = draw(st.lists(st.sampled_from(("gqa", "lightning", "mla")), min_size=1, max_size=4))
    flags = ("tie_word_embeddings", "use_qkv_bias", "use_bias", "mlp_bias", "gqa_qk_norm", "use_qk_norm", "linear_silu")
    moe = tuple(i for i in range(len(kinds)) if draw(st.booleans()))
    return config(
        kinds,
        num_key_value_heads=draw(st.sampled_from((1, 2, 4))),
        group_norm_size=draw(st.sampled_from((1, 2, 4, 8))),
        q_lora_rank=draw(st.sampled_from((None, 9))),
        kv_lora_rank=draw(st.sampled_from((10, 40))),  # the second is expanded again for more than 8 new tokens
        qk_rope_head_dim=draw(st.sampled_from((2, 4, 8))),
        partial_rotary_factor=draw(st.sampled_from((0.25, 0.5, 1.0))),
        rope_scaling=draw(st.sampled_from((None, YARN, YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}))),
        lightning_decay_offset=draw(st.sampled_from((0, 1))),
        moe_layers=moe,
        **({**EXPERTS, "score_function": draw(st.sampled_from(("sigmoid", "softmax")))} if moe else {}),
        **{name: draw(st.booleans()) for name in flags},
    )


# ---------------------------------------------------------------------------------------------------------------------
# The same function in every form of a call
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(c=hybrids(), length=st.integers(2, 14), data=st.data(), seed=st.integers(0, 99))
@torch.no_grad()
def test_prefill_chunks_and_single_tokens_agree(c, length, data, seed):
    model, ids = build(c, seed), tokens(2, length, seed)
    full = model(ids)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1))))
    for ends in ([*cuts, length], range(1, length + 1)):
        cache, parts, start = model.new_cache(), [], 0
        for end in ends:
            parts.append(model(ids[:, start:end], cache=cache))
            start = end
        close(torch.cat(parts, dim=1), full, ROUNDING)
        assert cache.length == length


@settings(max_examples=25, deadline=None)
@given(c=hybrids(), lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any), seed=st.integers(0, 99))
@torch.no_grad()
def test_packed_documents_equal_separate_ones(c, lengths, seed):
    model, ids = build(c, seed), tokens(1, sum(lengths), seed)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = model(ids, cu_seqlens=torch.tensor(bounds))
    separate = [model(ids[:, a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]
    close(packed, torch.cat(separate, dim=1), ROUNDING)


@settings(max_examples=25, deadline=None)
@given(c=hybrids(), padding=st.integers(1, 6), length=st.integers(1, 7), seed=st.integers(0, 99))
@torch.no_grad()
def test_left_padding_equals_none_also_when_decoding_on(c, padding, length, seed):
    """One short and one full row in a batch, then two more tokens without a mask."""
    model, short, long = build(c, seed), tokens(1, length + 2, seed), tokens(1, length + padding + 2, seed + 1)
    ids = torch.cat((torch.cat((tokens(1, padding, seed + 2), short), dim=1), long))
    mask = torch.ones(2, padding + length, dtype=torch.long)
    mask[0, :padding] = 0
    cache = model.new_cache()
    parts = [model(ids[:, :-2], cache=cache, attention_mask=mask), *(model(ids[:, i : i + 1], cache=cache) for i in (-2,))]
    parts.append(model(ids[:, -1:], cache=cache))
    found = torch.cat(parts, dim=1)
    assert torch.isfinite(found).all()
    close(found[:1, padding:], model(short), 1e-4)
    close(found[1:], model(long), 1e-4)
    close(model(ids[:, :-2], attention_mask=mask), parts[0], ROUNDING)


@pytest.mark.parametrize(
    "kinds", [("gqa", "gqa"), ("lightning", "lightning"), ("mla", "mla"), ("gqa", "lightning", "mla", "lightning")]
)
@torch.no_grad()
def test_fp32_forms_agree(kinds):
    """FP32 at 150 tokens (more than two Lightning chunks): 1e-4 of the largest logit, as the golden cases allow."""
    model = build(config(kinds, moe_layers=(1,), q_lora_rank=9, **EXPERTS), dtype=torch.float32)
    ids = tokens(1, 150)
    full, cache = model(ids), model.new_cache()
    parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 100), (100, 101), (101, 140), (140, 141), (141, 150))]
    close(torch.cat(parts, dim=1), full, 1e-4)


@torch.no_grad()
def test_a_reordered_cache_continues_the_chosen_sequences():
    model, ids = build(config()), tokens(3, 9)
    cache, order = model.new_cache(), torch.tensor([2, 0, 0])
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, :3] = False
    model(ids[:, :8], cache=cache, attention_mask=mask)
    cache.reorder(order)
    whole = torch.cat((mask, torch.ones(3, 1, dtype=torch.bool)), dim=1)
    expected = model(torch.cat((ids[order, :8], ids[:, 8:]), dim=1), attention_mask=whole[order])[:, -1:]
    close(model(ids[:, 8:], cache=cache), expected, ROUNDING)


@torch.no_grad()
def test_causality():
    """A changed token changes nothing before it."""
    model, ids = build(config(moe_layers=(2,), **EXPERTS)), tokens(1, 12)
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % VOCAB
    a, b = model(ids), model(other)
    close(b[:, :7], a[:, :7], 1e-12)
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_hidden_states_and_logits():
    """L + 1 tensors: embeddings, outputs of all layers but the last, the final norm's output."""
    c = config()
    model, ids = build(c), tokens(2, 5)
    kept = []
    logits = model(ids, hidden_states=kept)
    assert len(kept) == c.num_hidden_layers + 1
    assert torch.equal(kept[0], model.model.word_embeddings(ids))
    call = CallContext(model.model.rope(ids, 0, None), None, None)
    for i in range(c.num_hidden_layers - 1):
        assert torch.equal(model.model.layers[i](kept[i], call), kept[i + 1])
    last = model.model.layers[-1](kept[-2], call)
    assert torch.equal(model.model.norm(last), kept[-1])
    assert torch.equal(model.lm_head(kept[-1]), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_fp32_and_states_too(dtype):
    model, cache = build(config(), dtype=dtype), None
    cache = model.new_cache()
    assert model(tokens(1, 5), cache=cache).dtype == torch.float32
    assert cache.layers[1].state.dtype == torch.float32
    assert cache.layers[0].keys.append(torch.zeros(1, 1, 2, 8, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(1, 5)).dtype == torch.float32


def test_every_parameter_that_a_token_meets_gets_a_finite_gradient():
    c = config(
        ("gqa", "lightning", "mla"), q_lora_rank=9, moe_layers=(1,), num_nextn_predict_layers=1, gqa_qk_norm=True, **EXPERTS
    )
    model, ids, kept = build(c), tokens(2, 40), []
    logits = model(ids, hidden_states=kept)
    mtp = model.mtp_logits(ids, kept[-1])
    sum(F.cross_entropy(x[:, :-2].flatten(0, 1), ids[:, 2:].flatten()) for x in (logits, *mtp)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_tied_embeddings_are_one_tensor():
    model = build(config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.word_embeddings.weight


def test_init_weights():
    c = config(moe_layers=(1,), use_qkv_bias=True, initializer_range=0.006, **EXPERTS)
    model = Ling(c)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            assert not x.any()
        elif x.dim() == 1:
            assert torch.equal(x, torch.ones_like(x))
    matrices = torch.cat([x.detach().flatten() for x in model.parameters() if x.dim() > 1])
    assert matrices.std() == pytest.approx(0.006, rel=0.03)  # some 25,000 values: 0.5 % standard error


# ---------------------------------------------------------------------------------------------------------------------
# MTP
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mtp_layers_follow_the_published_chain():
    """Embedding first, ids shifted by one more per layer and filled with 0, each layer fed the one before; shared head."""
    c = config(("lightning", "gqa"), num_nextn_predict_layers=2, moe_layers=(1,), **EXPERTS)
    model, ids, kept = build(c), tokens(2, 9), []
    model(ids, hidden_states=kept)
    found = model.mtp_logits(ids, kept[-1])
    assert len(found) == 2
    h, call = kept[-1], CallContext(model.model.rope(ids, 0, None), None, None)
    for k, layer in enumerate(model.model.layers[2:]):
        assert isinstance(layer.attention, LatentAttention)  # never on the grouping rule (trap T12)
        ahead = torch.zeros_like(ids)
        ahead[:, : 9 - k - 1] = ids[:, k + 1 :]
        e = model.model.word_embeddings(ahead)
        x = layer.eh_proj(torch.cat((layer.enorm(e), layer.hnorm(h)), dim=-1))
        x = x + layer.attention(layer.input_layernorm(x), call)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        h = layer.final_layernorm(x)
        close(found[k], model.lm_head(h), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Mixers against their formulas (architecture.md 3.2, 3.3, 3.7), token by token in FP64
# ---------------------------------------------------------------------------------------------------------------------


def norm(x, weight, eps=1e-6):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turn(x, position, theta, rotary, interleaved):
    """RoPE of one head vector by complex numbers."""
    out = x.clone()
    for j in range(rotary // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + rotary // 2)
        angle = position * theta ** (-2 * j / rotary)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def mixer(c: ModelConfig, kind):
    """A layer's mixer of one kind, layer input and the context of a call."""
    model = build(c)
    layer = c.layer_kinds.index(kind)
    x = torch.randn(1, 11, c.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    call = CallContext(Rope(c)(torch.zeros(1, 11, dtype=torch.long), 0, None), None, None)
    return model.model.layers[layer].attention, layer, x, call


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("silu", [False, True])
@torch.no_grad()
def test_lightning_mixer_equals_its_formula(offset, silu):
    """[Q | K | V] rows, QK-norm, RoPE on the first dims, decay, scale once, groups, gate from the same input, dense."""
    c = config(("gqa", "lightning", "mla"), lightning_decay_offset=offset, linear_silu=silu)
    m, layer, x, call = mixer(c, "lightning")
    assert isinstance(m, LightningAttention)
    heads, dim = 4, 8
    w_q, w_k, w_v = m.query_key_value.weight.unflatten(0, (3, heads, dim))
    lam = log_decay(heads, layer, 3, offset).double().exp()
    activate = F.silu if silu else (lambda y: y)
    state, out = torch.zeros(heads, dim, dim, dtype=torch.float64), []
    for t in range(11):
        row = []
        for h in range(heads):
            q, k, v = (activate(w[h] @ x[0, t]) for w in (w_q, w_k, w_v))
            q = turn(norm(q, m.query_layernorm.weight), t, c.rope_theta, 4, False)
            k = turn(norm(k, m.key_layernorm.weight), t, c.rope_theta, 4, False)
            state[h] = lam[h] * state[h] + torch.outer(k, v)
            row.append(dim**-0.5 * q @ state[h])
        o = torch.cat(row)
        o = torch.cat([norm(part, w) for part, w in zip(o.chunk(2), m.g_norm.weight.chunk(2), strict=True)])
        out.append(m.dense.weight @ (o * torch.sigmoid(m.g_proj.weight @ x[0, t])))
    close(m(x, call)[0], torch.stack(out), 1e-5)  # FP32 tables of RoPE and decays


@pytest.mark.parametrize("q_rank", [None, 9])
@pytest.mark.parametrize("scaling", [None, YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}])
@torch.no_grad()
def test_mla_mixer_equals_its_formula(q_rank, scaling):
    """[nope | rope] queries, [latent | rope] keys, norm on the latent only, interleaved RoPE on all rope dims, biases."""
    c = config(q_lora_rank=q_rank, use_qkv_bias=True)
    m, _, x, call = mixer(c, "mla")
    assert isinstance(m, LatentAttention)
    scale = 12**-0.5
    if scaling is not None:  # without changing the angles: only the softmax scale is under test here
        scale *= (0.1 * 0.5 * math.log(4) + 1) ** 2
        m.scale = LatentAttention(c.replace(rope_scaling=scaling), 2).scale
    q_out, keys, values = [], [], []
    for t in range(11):
        y = x[0, t]
        if q_rank is None:
            q = m.q_proj.weight @ y + m.q_proj.bias
        else:
            q = m.q_b_proj.weight @ norm(m.q_a_proj.weight @ y + m.q_a_proj.bias, m.q_a_layernorm.weight)
        q_out.append([torch.cat((h[:8], turn(h[8:], t, c.rope_theta, 4, True))) for h in q.split(12)])
        kv = m.kv_a_proj_with_mqa.weight @ y + m.kv_a_proj_with_mqa.bias
        shared = turn(kv[10:], t, c.rope_theta, 4, True)
        up = m.kv_b_proj.weight @ norm(kv[:10], m.kv_a_layernorm.weight)
        keys.append([torch.cat((h[:8], shared)) for h in up.split(14)])
        values.append([h[8:] for h in up.split(14)])
    out = []
    for t in range(11):
        row = []
        for h in range(4):
            p = torch.softmax(torch.stack([scale * q_out[t][h] @ keys[s][h] for s in range(t + 1)]), dim=0)
            row.append(sum(p[s] * values[s][h] for s in range(t + 1)))
        out.append(m.dense.weight @ torch.cat(row) + m.dense.bias)
    close(m(x, call)[0], torch.stack(out), 1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_gqa_mixer_equals_its_formula(qk_norm):
    c = config(gqa_qk_norm=qk_norm, use_qkv_bias=True, use_bias=True)
    m, _, x, call = mixer(c, "gqa")
    assert isinstance(m, GroupedQueryAttention)
    keys, values, out = [], [], []
    for t in range(11):
        parts = (m.query_key_value.weight @ x[0, t] + m.query_key_value.bias).split((32, 16, 16))
        q, k, v = (p.split(8) for p in parts)
        if qk_norm:
            q, k = [norm(h, m.query_layernorm.weight) for h in q], [norm(h, m.key_layernorm.weight) for h in k]
        q, k = ([turn(h, t, c.rope_theta, 4, False) for h in heads] for heads in (q, k))
        keys.append(k)
        values.append(v)
        row = []
        for h in range(4):
            p = torch.softmax(torch.stack([8**-0.5 * q[h] @ keys[s][h // 2] for s in range(t + 1)]), dim=0)
            row.append(sum(p[s] * values[s][h // 2] for s in range(t + 1)))
        out.append(m.dense.weight @ torch.cat(row) + m.dense.bias)
    close(m(x, call)[0], torch.stack(out), 1e-5)


@pytest.mark.parametrize(("kind", "published"), [("mla", 0.0721688), ("lightning", 0.0883883)])
def test_published_scales(kind, published):
    """192^(-1/2) and 128^(-1/2) of Ling-2.6, and their ratio sqrt(192/128) = 1.2247."""
    c = config(head_dim=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    scale = LatentAttention(c, 2).scale if kind == "mla" else LightningAttention(c, 1).dim ** -0.5
    assert round(scale, 7) == published
    assert round(128**-0.5 / LatentAttention(c, 2).scale, 4) == 1.2247


def test_the_decay_is_neither_parameter_nor_buffer():
    names = [name for name, _ in build(config()).named_parameters()] + [name for name, _ in build(config()).named_buffers()]
    assert not [name for name in names if "decay" in name or "slope" in name]


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": -1}, "num_attention_heads"),
        ({"layer_kinds": ("gqa", "mla")}, "layer_kinds"),
        ({"layer_kinds": ("gqa", "mamba", "mla")}, "layer_kinds"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"group_norm_size": 5}, "group_norm_size"),
        ({"group_norm_size": 0}, "group_norm_size"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"qk_nope_head_dim": -8}, "qk_nope_head_dim"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim"),
        ({"v_head_dim": 0}, "v_head_dim"),
        ({"mtp_layer_kind": "lightning"}, "mtp_layer_kind"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rope_theta": -5.0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"moe_layers": (1,)}, "num_experts"),
        ({**EXPERTS, "moe_layers": (1,), "n_group": 3}, "n_group"),
        ({**EXPERTS, "moe_layers": (1,), "n_group": 0}, "n_group"),
        ({**EXPERTS, "moe_layers": (1,), "n_group": 8, "topk_group": 8}, "n_group"),
        ({**EXPERTS, "moe_layers": (1,), "topk_group": 5}, "topk_group"),
        ({**EXPERTS, "moe_layers": (1,), "topk_group": 1}, "num_experts_per_tok"),
        ({**EXPERTS, "moe_layers": (1,), "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({**EXPERTS, "moe_layers": (3,)}, "moe_layers"),
    ],
)
def test_contradictory_configurations_are_refused(changes, where):
    with pytest.raises(UserError, match="contradicts itself") as caught:
        config(**changes)
    assert caught.value.parts["where"] == where
    assert caught.value.parts["expected"] is not None
    assert caught.value.exit_code == 2


def test_mtp_layers_need_mla_widths_too():
    with pytest.raises(UserError) as caught:
        config(("gqa",), num_nextn_predict_layers=1, kv_lora_rank=None)
    assert caught.value.parts["where"] == "kv_lora_rank"
    config(("gqa",), kv_lora_rank=None)  # no MLA layer, no need


@settings(max_examples=40, deadline=None)
@given(hybrids())
def test_config_json_round_trip(c):
    """What openling writes, it reads back the same, expert widths and layer kinds included."""
    assert read_ling(write_ling(c)) == c
    assert read_config(write_ling(c)) == c


@pytest.mark.parametrize(("layers", "group", "full"), [(8, 4, {3, 7}), (10, 4, {3, 7, 8, 9}), (5, 5, {4}), (3, 8, {0, 1, 2})])
def test_published_layer_rule(layers, group, full):
    """Layer i is full attention iff (i + 1) % G == 0 or i >= (L // G) G."""
    hf = write_ling(config(("mla",) * layers)) | {"layer_group_size": group}
    del hf["layer_kinds"]
    assert {i for i, kind in enumerate(read_ling(hf).layer_kinds) if kind == "mla"} == full
    gqa = read_ling(hf | {"full_attention_type": "gqa"}).layer_kinds
    assert {i for i, kind in enumerate(gqa) if kind == "gqa"} == full


def test_nothing_here_imports_the_compiler():
    """It was a third of a server's start, and of its first long prompt seconds."""
    code = """
import sys, torch
from openling.bench.nano import NANO, Ling
with torch.device("meta"):
    Ling(NANO)
model = Ling(NANO).eval()
cache = model.new_cache()
with torch.inference_mode():
    for length in (8, 128, 1):
        model(torch.zeros(1, length, dtype=torch.long), cache=cache)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
