"""The exactness identities of the migration (migration.md 10): one test or more for every row, by name.

- GQA -> MHA replicate: test_gqa_to_mha_replicate
- joint permutation of (q, k, v, o) heads: test_joint_permutation_of_heads
- gamma folding into rows before RoPE: test_gamma_folding_into_rows_before_rope
- half-split <-> interleaved permutation: test_half_split_to_interleaved_rows
- RoRoPE, full rank: test_rorope_full_rank
- balance alpha: test_balance_leaves_the_full_rank_map; query scale: test_query_scale
- MLA full rank, no RoPE drop, latent norms identity, no QK-norm: test_mla_full_rank_equals_gqa
- absorbed == expanded MLA decode: test_absorbed_equals_expanded_after_a_conversion, tests/ops/test_attention.py
- chunk == recurrent Lightning: tests/ops/test_lightning.py
- output PCA error == C^{1/2}-weighted SVD error: test_output_pca_error_equals_weighted_svd_error
- W_gate = 0 with gamma doubled == no gate: test_zero_gate_with_doubled_gamma_equals_no_gate
- parameter counts: tests/model/test_count.py; bit-equality of files: tests/weights

The rows ask for 1e-4 or 1e-5 in FP32. FP64 versions are held to what rounding leaves, so that no small real error can hide.
"""

import pytest
import torch
from tiny_gqa import SHAPES, T, build, config, context, energy, moment_of, randn, relative, tokens, with_ones
from torch import nn

from openling.migrate.lightning import split_heads, widen
from openling.migrate.mla import (
    Projections,
    balance_metric,
    fill_mla,
    low_rank,
    pairs,
    rorope_basis,
)
from openling.model.config import ModelConfig
from openling.model.ling import GroupedQueryAttention, LatentAttention, LightningAttention, Ling
from openling.ops.rope import apply_rope

# ---------------------------------------------------------------------------------------------------------------------
# Widening
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def as_mha(model: Ling, order) -> Ling:
    """The same model with as many K/V heads as query heads, its rows those that `widen` writes."""
    c = model.config
    mha = build(c.replace(num_key_value_heads=c.num_attention_heads), seed=99, dtype=model.lm_head.weight.dtype)
    state = model.state_dict()
    mha.load_state_dict({k: state[k] if state[k].shape == v.shape else v for k, v in mha.state_dict().items()})
    for i, layer in enumerate(mha.model.layers):
        target = LightningAttention(c.replace(use_qk_norm=c.gqa_qk_norm), i).to(model.lm_head.weight)
        widen(model.model.layers[i].attention, target, order=order)
        layer.attention.query_key_value.load_state_dict(target.query_key_value.state_dict())
        layer.attention.dense.load_state_dict(target.dense.state_dict())
        if c.gqa_qk_norm:
            layer.attention.query_layernorm.load_state_dict(target.query_layernorm.state_dict())
            layer.attention.key_layernorm.load_state_dict(target.key_layernorm.state_dict())
    return mha


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@torch.no_grad()
def test_gqa_to_mha_replicate(shape, dtype, tolerance):
    model = build(config(**SHAPES[shape]), dtype=dtype)
    ids = tokens(2)
    assert relative(as_mha(model, None)(ids), model(ids)) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@torch.no_grad()
def test_joint_permutation_of_heads(shape, dtype, tolerance):
    model = build(config(**SHAPES[shape]), dtype=dtype)
    ids = tokens(2)
    order = torch.tensor([2, 0, 3, 1])
    permuted = as_mha(model, order)
    assert relative(permuted(ids), model(ids)) < tolerance
    plain = as_mha(model, None).model.layers[0].attention.query_key_value.weight
    assert not torch.equal(permuted.model.layers[0].attention.query_key_value.weight, plain)


# ---------------------------------------------------------------------------------------------------------------------
# Lightning's gate
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@torch.no_grad()
def test_zero_gate_with_doubled_gamma_equals_no_gate(dtype, tolerance):
    c = config(layer_kinds=("lightning", "lightning"))
    m, x, call = build(c, dtype=dtype).model.layers[0].attention, randn(2, T, 32, dtype=dtype), context(c)
    ungated = m.dense(m.g_norm(m.kernel(x, call)))
    m.g_proj.weight.zero_()
    m.g_norm.weight.mul_(2)
    assert relative(m(x, call), ungated) < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# RoPE algebra
# ---------------------------------------------------------------------------------------------------------------------


def test_gamma_folding_into_rows_before_rope():
    x, w, gamma = randn(1, T, 32, dtype=torch.float32), randn(4, 8, 32, seed=1).float(), randn(8, seed=2).float()
    tables = context(config()).tables.head
    after = apply_rope(gamma * torch.einsum("hdm,btm->bthd", w, x), *tables)
    folded = apply_rope(torch.einsum("hdm,btm->bthd", gamma[:, None] * w, x), *tables)
    assert relative(folded, after) < 1e-5


def test_half_split_to_interleaved_rows():
    """Rows move as new[2j] = old[j], new[2j+1] = old[j + r/2], for q and k alike: the same scores."""
    c = config(partial_rotary_factor=0.5)
    x, tables = randn(1, T, 32).float(), context(c).tables.head
    order = torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])
    wq, wk = randn(8, 32, seed=1).float(), randn(8, 32, seed=2).float()
    scores = []
    for q_rows, k_rows, interleaved in ((wq, wk, False), (wq[order], wk[order], True)):
        q, k = (apply_rope((x @ w.T)[:, :, None], *tables, interleaved=interleaved) for w in (q_rows, k_rows))
        scores.append(torch.einsum("bthd,bshd->bts", q, k))
    assert relative(scores[1], scores[0]) < 1e-5


@pytest.mark.parametrize(("kv_heads", "partial"), [(1, 1.0), (2, 1.0), (4, 1.0), (2, 0.5)])
@torch.no_grad()
def test_rorope_full_rank(kv_heads, partial):
    """K turned over heads by the whole basis, Q inversely, frequency by frequency: scores of every head are unchanged."""
    c = config(num_key_value_heads=kv_heads, partial_rotary_factor=partial)
    m, tables = build(c).model.layers[0].attention, context(c).tables.head
    w, rotary, group = Projections.of(m), c.rotary_dim, 4 // kv_heads
    x = with_ones(randn(1, T, 32, seed=3))
    values, basis = rorope_basis(pairs(w.k, rotary, 1), moment_of(x))
    assert (values.diff(dim=-1) <= 0).all()
    q = torch.einsum("hdm,nm->nhd", w.q[:, :rotary], x)
    k = torch.einsum("hdm,nm->nhd", w.k[:, :rotary], x)
    expected = torch.einsum("thd,shd->hts", *(apply_rope(y[None], *tables)[0] for y in (q, k.repeat_interleave(group, 1))))
    # Component a of frequency p: sum_h U[p, h, a] k_h; the query of head h has components U[p, kv(h), a] q_h.
    k_new = torch.einsum("pha,nhcp->nacp", basis, k.unflatten(-1, (2, -1))).flatten(2)
    per_head = basis.repeat_interleave(group, 1)
    q_new = torch.einsum("pha,nhcp->nhacp", per_head, q.unflatten(-1, (2, -1))).flatten(3)
    found = torch.einsum(
        "thad,sad->hts",
        apply_rope(q_new.flatten(1, 2)[None], *tables)[0].unflatten(1, (4, -1)),
        apply_rope(k_new[None], *tables)[0],
    )
    assert relative(found, expected) < 5e-15 * 4  # 5e-15 was measured in numpy; four times for another order of summation
    turned = k_new.unflatten(-1, (2, -1)).pow(2).sum((0, 2)).T  # energy of [frequency, component]
    assert torch.allclose(turned / T, values, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Low rank
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 12, 20])
def test_output_pca_error_equals_weighted_svd_error(rank):
    """E |W x - up down x|^2 = the tail of the singular values of W C^{1/2}; the plain SVD of W is worse."""
    rows, x = randn(20, 33), randn(300, 33, seed=1) * torch.logspace(0, -3, 33)
    moment = moment_of(x)
    found = low_rank(rows, moment, rank)
    error = energy(rows - found.up @ found.down, moment)
    # C^{1/2} by Cholesky: any root gives the same singular values.
    tail = torch.linalg.svdvals(rows @ torch.linalg.cholesky(moment))[rank:].pow(2).sum()
    total = energy(rows, moment)
    assert abs(error - float(tail)) <= 1e-6 * float(tail) + 1e-12 * total
    assert found.energy_kept == pytest.approx(1 - float(tail) / total, abs=1e-12)
    u, s, vh = torch.linalg.svd(rows)
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert rank == 20 or energy(rows - plain, moment) > 1.1 * error


@pytest.mark.parametrize("balance", ["ratio", "weighted"])
@torch.no_grad()
def test_balance_leaves_the_full_rank_map(balance):
    """alpha (or the weighted metric) and its inverse cancel; in the metric K and V have equal energy."""
    m = build(config(use_qkv_bias=True)).model.layers[0].attention
    w, moment = Projections.of(m), moment_of(with_ones(randn(1, T, 32)))
    metric = balance_metric(w, w.k, moment, m.dense.weight, balance)
    rows = torch.cat((w.k, w.v)).flatten(0, 1)
    found = low_rank(rows, moment, len(rows), metric)
    assert relative(found.up @ found.down, rows) < 1e-11
    k, v = (metric @ rows).chunk(2)
    assert energy(k, moment) == pytest.approx(energy(v, moment), rel=1e-9)
    if balance == "ratio":
        alpha = (energy(rows[:16], moment) / energy(rows[16:], moment)) ** 0.5
        expected = torch.block_diag(torch.eye(16).double() / alpha, torch.eye(16).double())
        assert torch.allclose(metric, expected, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# A whole MLA mixer at full rank
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def proportional_keys(m: GroupedQueryAttention, rotary: int) -> None:
    """Make every K head a multiple of the first, one factor per frequency: then no rotated key has to be dropped."""
    for name in ("weight", "bias"):
        packed = getattr(m.query_key_value, name)
        if packed is None:
            continue
        k = packed.unflatten(0, (-1, m.dim))[m.heads : m.heads + m.kv_heads]
        first = k[0, :rotary].unflatten(0, (2, -1)).clone()
        for h in range(m.kv_heads):
            factor = randn(rotary // 2, seed=h + 3)
            k[h, :rotary] = (first * (factor[:, None] if first.dim() == 3 else factor)).flatten(0, 1)


MIXERS = {
    "one K/V head": {"num_key_value_heads": 1},
    "one K/V head, half RoPE": {"num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    "two proportional heads": {"num_key_value_heads": 2},
    "four proportional heads": {"num_key_value_heads": 4},
    "proportional, half RoPE, biases": {
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": True,
        "use_bias": True,
    },
    "proportional, QKV biases": {"num_key_value_heads": 2, "use_qkv_bias": True},
    "output bias": {"num_key_value_heads": 1, "use_bias": True},
}


def full_rank_mla(c: ModelConfig, source, x, *, low_rank_query, balance, latent_norm, query_weighted, dtype):
    """An MLA mixer at full ranks, its latent norms the identity."""
    q_rank = c.num_attention_heads * (c.head_dim + c.rotary_dim) if low_rank_query else None
    ranks = {"kv_lora_rank": 2 * c.num_key_value_heads * c.head_dim, "q_lora_rank": q_rank}
    target = LatentAttention(c.replace(layer_kinds=("mla", "mla"), **ranks), 0).to(dtype)
    kept = fill_mla(
        target,
        Projections.of(source),
        source.dense,
        [with_ones(part) for part in x.split(1)],
        rotary=c.rotary_dim,
        balance=balance,
        latent_norm=latent_norm,
        query_weighted=query_weighted,
    )
    target.kv_a_layernorm = nn.Identity()
    target.q_a_layernorm = nn.Identity()
    return target, kept.energy


@pytest.mark.parametrize("shape", MIXERS)
@pytest.mark.parametrize("balance", ["ratio", "weighted"])
@pytest.mark.parametrize("low_rank_query", [False, True])
@pytest.mark.parametrize("query_weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@torch.no_grad()
def test_mla_full_rank_equals_gqa(shape, balance, low_rank_query, query_weighted, dtype, tolerance):
    """`rms` leaves the up-projections alone, so that norms replaced by the identity leave the plain factors.

    FP64: keys without a rotated rest are noise of 1e-17, scaled up by at most 1e6 in the latent's metric; 1e-8 has room for both.
    """
    c = config(**MIXERS[shape])
    source, x, call = build(c, dtype=dtype).model.layers[0].attention, randn(3, T, 32, seed=5, dtype=dtype), context(c)
    proportional_keys(source, c.rotary_dim)
    options = {"balance": balance, "latent_norm": "rms", "query_weighted": query_weighted, "low_rank_query": low_rank_query}
    target, kept = full_rank_mla(c, source, x, dtype=dtype, **options)
    assert all(share == pytest.approx(1.0, abs=1e-9) for share in kept.values())
    assert relative(target(x, call), source(x, call)) < tolerance
    unseen = randn(2, T, 32, seed=6, dtype=dtype)
    assert relative(target(unseen, call), source(unseen, call)) < tolerance


@torch.no_grad()
def test_heads_that_are_not_proportional_lose_rope():
    """The control: with independent K heads the same conversion is not exact, and says so."""
    c = config(num_key_value_heads=2)
    source, x, call = build(c).model.layers[0].attention, randn(3, T, 32, seed=5), context(c)
    target, kept = full_rank_mla(
        c, source, x, dtype=torch.float64, balance="weighted", latent_norm="rms", query_weighted=True, low_rank_query=False
    )
    assert kept["rope energy kept"] < 0.95
    assert kept["kv energy kept"] == pytest.approx(1.0)
    assert relative(target(x, call), source(x, call)) > 1e-2


@torch.no_grad()
def test_query_scale():
    """Rows carry sqrt((nope + rope) / D), which cancels MLA's own scale."""
    c = config(num_key_value_heads=1, partial_rotary_factor=0.5)
    source, x = build(c).model.layers[0].attention, randn(3, T, 32)
    target, _ = full_rank_mla(
        c, source, x, dtype=torch.float64, balance="ratio", latent_norm="rms", query_weighted=False, low_rank_query=False
    )
    nope = target.q_proj.weight.unflatten(0, (4, 12))[:, :8]
    plain = split_heads(source, "weight")[0]
    assert relative(nope * target.scale, plain * 8**-0.5) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@torch.no_grad()
def test_absorbed_equals_expanded_after_a_conversion(dtype, tolerance):
    c = config(num_key_value_heads=2)
    source, x = build(c, dtype=dtype).model.layers[0].attention, randn(2, T, 32, dtype=dtype)
    m, _ = full_rank_mla(
        c, source, x, dtype=dtype, balance="weighted", latent_norm="channel", query_weighted=True, low_rank_query=True
    )
    call = context(c, 5)
    q = m.q_b_proj(m.q_a_proj(x)).unflatten(-1, (4, -1))
    latent, k_rope = m.kv_a_proj_with_mqa(x).split((m.rank, m.rope), dim=-1)
    forms = [f(q[:, -5:], latent, k_rope, call) for f in (m.absorbed, m.expanded)]
    assert relative(*forms) < tolerance


@torch.no_grad()
def test_keys_that_fit_the_shared_key_take_no_room_in_the_latent():
    """One K head, RoPE on all dims: nothing is left of K, and a latent of V's width alone is exact."""
    c = config(num_key_value_heads=1, kv_lora_rank=8)
    source, x, call = build(c).model.layers[0].attention, randn(3, T, 32), context(c)
    for balance in ("ratio", "weighted"):
        target = LatentAttention(c.replace(layer_kinds=("mla", "mla")), 0).double()
        inputs = [with_ones(x)]
        options = {"rotary": 8, "balance": balance, "latent_norm": "rms", "query_weighted": True}
        kept = fill_mla(target, Projections.of(source), source.dense, inputs, **options)
        target.kv_a_layernorm = nn.Identity()
        assert all(torch.isfinite(p).all() for p in target.parameters())
        assert kept.energy["kv energy kept"] == pytest.approx(1.0)
        assert relative(target(x, call), source(x, call)) < 1e-8
