"""The exactness identities of the migration (migration.md 10), each a test named after its row, and the fits' optimality.

| identity | test |
|---|---|
| GQA -> MHA replicate; joint permutation of heads | test_gqa_to_mha_replicate, test_joint_permutation_of_heads |
| gamma folding before RoPE; half-split <-> interleaved | test_gamma_folding_into_rows_before_rope, test_half_split_to_interleaved_rows |
| RoRoPE, full rank | test_rorope_full_rank |
| balance alpha; query scale | test_balance_leaves_the_full_rank_map, test_query_scale |
| MLA full rank without RoPE drop, latent norms identity | test_mla_full_rank_... |
| absorbed == expanded MLA decode | test_absorbed_equals_expanded_after_a_conversion; tests/ops/test_attention.py |
| chunk == recurrent Lightning | tests/ops/test_lightning.py |
| output PCA error == C^{1/2}-weighted SVD error | test_output_pca_error_equals_weighted_svd_error |
| W_gate = 0 with gamma doubled == no gate | test_zero_gate_with_doubled_gamma_equals_no_gate |

The rows ask for 1e-4 or 1e-5 in FP32. FP64 versions are held to what rounding leaves, so that no small real error can hide.
"""

import numpy as np
import pytest
import torch
from torch import nn

from openling.migrate.calibrate import Gram, LayerStep, walk
from openling.migrate.convert import derive
from openling.migrate.lightning import look_back, match_heads, randomise, refit_output, replicate, split_heads, widen
from openling.migrate.mla import (
    Projections,
    after_norm,
    balance_metric,
    concentrate,
    fill_mla,
    low_rank,
    matrix_sqrt,
    pairs,
    rorope_basis,
    split_rope,
)
from openling.model.config import ModelConfig
from openling.model.ling import CallContext, GroupedQueryAttention, LatentAttention, LightningAttention, Ling, Rope
from openling.ops.lightning import log_decay
from openling.ops.rope import apply_rope, rope_frequencies

T = 40


def config(**changes) -> ModelConfig:
    """A GQA model; MLA widths for what its layers become."""
    c = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_kinds": ("gqa", "gqa"),
        "group_norm_size": 4,
    } | changes
    rotary = int(c["head_dim"] * c.get("partial_rotary_factor", 1.0))
    widths = {"qk_nope_head_dim": c["head_dim"], "v_head_dim": c["head_dim"], "qk_rope_head_dim": rotary, "kv_lora_rank": 16}
    return ModelConfig(**widths | c)


@torch.no_grad()
def build(c: ModelConfig, seed=0, dtype=torch.float64) -> Ling:
    """Random norms and biases too."""
    g = torch.Generator().manual_seed(seed)
    model = Ling(c)
    for name, x in model.state_dict().items():
        noise = torch.randn(x.shape, generator=g)
        wide = noise if "embeddings" in name else noise * (1.5 / x.shape[-1] ** 0.5)
        x.copy_(wide if x.dim() >= 2 else 0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.to(dtype).eval()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def context(c: ModelConfig, tokens=T) -> CallContext:
    return CallContext(Rope(c)(torch.zeros(1, tokens, dtype=torch.long), 0, None), None, None)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def with_ones(x):
    rows = x.flatten(0, -2).double()
    return torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)


def moment_of(x_NM):
    gram = Gram()
    gram.add(x_NM)
    return gram.moment


def energy(rows, moment):
    """E |rows x|^2."""
    return float(torch.einsum("pm,mn,pn->", rows, moment, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Widening
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = {
    "llama": {},
    "qwen2": {"use_qkv_bias": True},
    "qwen3": {"gqa_qk_norm": True, "head_dim": 16},
    "biased": {"use_qkv_bias": True, "use_bias": True, "gqa_qk_norm": True},
    "ling-2.0": {"gqa_qk_norm": True, "partial_rotary_factor": 0.5},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
}


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
    ids = torch.randint(50, (2, T))
    assert relative(as_mha(model, None)(ids), model(ids)) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@torch.no_grad()
def test_joint_permutation_of_heads(shape, dtype, tolerance):
    model = build(config(**SHAPES[shape]), dtype=dtype)
    ids = torch.randint(50, (2, T))
    order = torch.tensor([2, 0, 3, 1])
    permuted = as_mha(model, order)
    assert relative(permuted(ids), model(ids)) < tolerance
    plain = as_mha(model, None).model.layers[0].attention.query_key_value.weight
    assert not torch.equal(permuted.model.layers[0].attention.query_key_value.weight, plain)


def test_replicate_follows_the_grouping_rule():
    """kv(h) = floor(h K / H)."""
    heads = torch.arange(3.0)[:, None]
    assert replicate(heads, 12).flatten().tolist() == [h * 3 // 12 for h in range(12)]


def test_random_heads_keep_the_originals_first_in_each_group():
    heads = randn(2, 8, 1000)
    wide = randomise(heads, 8, torch.Generator().manual_seed(0))
    assert torch.equal(wide[0], heads[0])
    assert torch.equal(wide[4], heads[1])
    new = wide[[1, 2, 3, 5, 6, 7]]
    assert float(new.std()) == pytest.approx(0.006, rel=0.02)  # 48,000 values: 0.3 % standard error
    assert torch.equal(wide, randomise(heads, 8, torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_random_widening_draws_the_gate_and_replication_zeroes_it():
    c = config(use_qkv_bias=True, gqa_qk_norm=True)
    source = build(c).model.layers[0].attention
    for generator in (None, torch.Generator().manual_seed(1)):
        target = LightningAttention(c, 0).double()
        widen(source, target, generator=generator)
        assert bool(target.g_proj.weight.any()) == (generator is not None)
        q, k, v = target.query_key_value.weight.unflatten(0, (3, 4, 8))
        own_q, own_k, own_v = split_heads(source, "weight")
        assert torch.equal(q, own_q)
        assert torch.equal(k[::2], own_k)
        assert torch.equal(v[::2], own_v)
        assert torch.equal(k[1], own_k[0]) == (generator is None)
        assert torch.equal(target.key_layernorm.weight, source.key_layernorm.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Lightning's gate, norm and heads
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


def step_of(model: Ling, windows) -> LayerStep:
    """The first layer, as a walk shows it."""
    return next(walk(model, model, windows, bf16=False))


@pytest.mark.parametrize("shape", ["llama", "qwen2", "ling-2.0", "mqa"])
@torch.no_grad()
def test_look_back_equals_the_explicit_matrix(shape):
    """d_h = mean over t of t - sum_s p_ts s, with the T x T matrix of probabilities written out."""
    c = config(**SHAPES[shape])
    model = build(c)
    windows = [torch.randint(50, (2, T)), torch.randint(50, (1, T))]
    step = step_of(model, windows)
    m = step.teacher.attention
    found = look_back(m, step)
    sums = torch.zeros(4, dtype=torch.float64)
    for x in step.inputs():
        q, k, _ = m.query_key_value(x).unflatten(-1, (-1, c.head_dim)).split((4, c.num_key_value_heads, c.num_key_value_heads), 2)
        if m.qk_norm:
            q, k = m.query_layernorm(q), m.key_layernorm(k)
        q, k = (apply_rope(y, *step.teacher_call.tables.head) for y in (q, k))
        scores = torch.einsum("bthd,bshd->bhts", q, replicate(k.transpose(0, 2), 4).transpose(0, 2)) * c.head_dim**-0.5
        p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        position = torch.arange(T, dtype=torch.float64)
        sums += (position[:, None] - position).mul(p).sum((0, 2, 3))
    assert torch.allclose(found, sums / (3 * T), rtol=1e-5)  # FP32 inside
    assert found.min() > 0


@torch.no_grad()
def test_look_back_is_not_rounded_to_bf16_under_autocast():
    """BF16 holds no odd integers beyond 256: a head that reads the token before would seem to read 0 or 2 back."""
    c = config(layer_kinds=("gqa",), num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = build(c)
    windows = [torch.randint(50, (1, 600), generator=torch.Generator().manual_seed(0))]
    exact = look_back(model.model.layers[0].attention, step_of(model, windows))
    model = model.float()
    walker = walk(model, model, windows, bf16=True)
    step = next(walker)
    q_k_rounding = 0.02  # BF16 queries and keys move the probabilities themselves by a percent or so
    assert float(look_back(step.teacher.attention, step)) == pytest.approx(float(exact), rel=q_k_rounding)
    walker.close()


def test_match_heads_gives_farther_readers_slower_decays():
    distance = torch.tensor([5.0, 1.0, 90.0, 30.0, 2.0, 7.0])
    decay = log_decay(6, 1, 4)
    order = match_heads(distance, decay)
    assert sorted(order.tolist()) == list(range(6))
    half_life = 1 / -decay
    assert torch.equal(distance[order].argsort(), half_life.argsort())
    assert order[half_life.argmax()] == 2


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_refit_equals_least_squares_and_reports_what_is_left(bias):
    c = config(num_hidden_layers=1, layer_kinds=("gqa",), use_bias=bias)
    teacher = build(c)
    student = derive(teacher, c.replace(layer_kinds=("lightning",)))
    windows = [torch.randint(50, (3, T)), torch.randint(50, (2, T))]
    step = next(walk(teacher, student, windows, bf16=False))
    target = step.student.attention
    widen(step.teacher.attention, target)
    z = torch.cat([target.mix(x, step.student_call).flatten(0, 1) for x in step.inputs()]).numpy()
    y = torch.cat([y.flatten(0, 1) for y in step.targets(False)]).numpy()
    if bias:
        assert torch.equal(target.dense.bias, step.teacher.attention.dense.bias)
        y = y - target.dense.bias.numpy()
    before = np.square(y - z @ target.dense.weight.numpy().T).sum() / np.square(y).sum()
    reported = refit_output(step, damping=1e-12, correct_residual=False)
    expected = np.linalg.lstsq(z, y, rcond=None)[0].T
    assert np.abs(target.dense.weight.numpy() - expected).max() / np.abs(expected).max() < 1e-6
    left = np.square(y - z @ target.dense.weight.numpy().T).sum() / np.square(y).sum()
    assert reported == pytest.approx(left, rel=1e-6)
    assert left < before


@torch.no_grad()
def test_refit_is_drawn_to_the_present_weights_and_never_worse_than_they():
    c = config(num_hidden_layers=1, layer_kinds=("gqa",))
    teacher = build(c)
    errors, distances = [], []
    for damping in (1e-12, 1e-3, 1.0, 1e3, 1e9):
        student = derive(teacher, c.replace(layer_kinds=("lightning",)))
        step = next(walk(teacher, student, [torch.randint(50, (2, T), generator=torch.Generator().manual_seed(1))], bf16=False))
        widen(step.teacher.attention, step.student.attention)
        old = step.student.attention.dense.weight.clone()
        errors.append(refit_output(step, damping=damping, correct_residual=False))
        distances.append(float((step.student.attention.dense.weight - old).norm()))
    assert errors == sorted(errors)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


@torch.no_grad()
def test_refit_with_the_residual_aims_at_the_teachers_stream():
    """A student whose stream is off by a linear map of its own features gets it back in full."""
    c = config(num_hidden_layers=1, layer_kinds=("gqa",))
    teacher = build(c)
    student = derive(teacher, c)
    walker = walk(teacher, student, [torch.randint(50, (2, T))], bf16=False)
    step = next(walker)
    y_plain, y_corrected = (torch.cat([y.flatten(0, 1) for y in step.targets(on)]) for on in (False, True))
    assert torch.equal(y_plain, y_corrected)
    step.student_h[0] = step.student_h[0] + 0.5
    moved = torch.cat([y.flatten(0, 1) for y in step.targets(True)])
    assert torch.allclose(moved, y_plain - 0.5)


def test_gram_ridge_and_moment():
    x, y, prior = randn(200, 6), randn(200, 3, seed=1), randn(3, 6, seed=2)
    gram = Gram()
    gram.add(x[:120].view(4, 30, 6), y[:120].view(4, 30, 3))
    gram.add(x[120:], y[120:])
    assert torch.allclose(gram.moment, x.T @ x / 200)
    lam = 0.1 * float((x.T @ x).diagonal().mean())
    # The same as least squares on the data with sqrt(lam) I and sqrt(lam) prior appended.
    augmented = np.concatenate([x.numpy(), lam**0.5 * np.eye(6)]), np.concatenate([y.numpy(), lam**0.5 * prior.T.numpy()])
    expected = np.linalg.lstsq(*augmented, rcond=None)[0].T
    assert np.allclose(gram.ridge(0.1, prior).numpy(), expected, rtol=1e-10, atol=1e-12)
    assert gram.ridge(1e9).abs().max() < 1e-6


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
        "thad,sad->hts", apply_rope(q_new.flatten(1, 2)[None], *tables)[0].unflatten(1, (4, -1)), apply_rope(k_new[None], *tables)[0]
    )
    assert relative(found, expected) < 5e-15 * 4  # 5e-15 was measured in numpy; four times for another order of summation
    turned = k_new.unflatten(-1, (2, -1)).pow(2).sum((0, 2)).T  # energy of [frequency, component]
    assert torch.allclose(turned / T, values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fold", [1, 2, 4])
@pytest.mark.parametrize("query_weighted", [False, True])
def test_concentration_keeps_the_most_energy(fold, query_weighted):
    """No other single component per frequency (2000 random ones) explains more of the keys in the chosen metric."""
    c = config()
    w, x = Projections.of(build(c).model.layers[0].attention), with_ones(randn(1, 100, 32, seed=3))
    basis = concentrate(w, moment_of(x), 8, fold, query_weighted=query_weighted)
    key = torch.einsum("ckpfm,nm->ncpkf", pairs(w.k, 8, fold), x).flatten(3)  # [n, 2, p, K f]
    assert torch.allclose((basis.down * basis.up).sum(-1), torch.ones(4 // fold).double())  # a projection
    weight = (basis.down / basis.up).sqrt()  # the metric, up to one factor per frequency
    scaled = key * weight
    total = scaled.pow(2).sum((0, 1, 3))
    first = (basis.down / weight) / (basis.down / weight).norm(dim=-1, keepdim=True)
    kept = torch.einsum("ncpa,pa->ncp", scaled, first).pow(2).sum((0, 1))
    others = torch.nn.functional.normalize(randn(2000, *first.shape), dim=-1)
    assert (torch.einsum("ncpa,rpa->rncp", scaled, others).pow(2).sum((1, 2)).amax(0) <= kept * (1 + 1e-12)).all()
    assert 0 < basis.energy_kept <= 1
    if not query_weighted:
        assert basis.energy_kept == pytest.approx(float(kept.sum() / total.sum()))


@pytest.mark.parametrize(("rotary", "rope"), [(16, 16), (16, 8), (16, 4), (8, 8), (8, 4), (8, 2)])
@torch.no_grad()
def test_folded_frequencies_and_shapes(rotary, rope):
    """fold = rotary / rope neighbours share one pair; the exported frequencies theta^(-2j/r) are the first of each."""
    c = config(head_dim=16, partial_rotary_factor=rotary / 16, qk_rope_head_dim=rope)
    fold = rotary // rope
    w, x = Projections.of(build(c).model.layers[0].attention), with_ones(randn(1, T, 32))
    basis = concentrate(w, moment_of(x), rotary, fold, query_weighted=True)
    k_rope, q_rope, left = split_rope(w, basis, rotary, fold)
    assert (k_rope.shape, q_rope.shape, left.shape) == ((rope, 33), (4, rope, 33), (2, 16, 33))
    assert torch.equal(left[:, rotary:], w.k[:, rotary:])  # unrotated dims are not touched
    exported, source = rope_frequencies(rope, c.rope_theta)[0], rope_frequencies(rotary, c.rope_theta)[0]
    assert torch.allclose(exported, source[::fold], rtol=1e-6)
    assert torch.allclose(exported, torch.tensor([c.rope_theta ** (-2 * j / rope) for j in range(rope // 2)]), rtol=1e-6)
    assert Rope(c)(torch.zeros(1, 3, dtype=torch.long), 0, None).latent[0].shape == (1, 3, 1, rope // 2)


@torch.no_grad()
def test_split_rope_loses_nothing_at_position_zero():
    """Without rotation (equal positions) k_rope and the rest add up to the whole key, whatever was folded."""
    for fold in (1, 2, 4):
        w, x = Projections.of(build(config()).model.layers[0].attention), with_ones(randn(1, T, 32))
        basis = concentrate(w, moment_of(x), 8, fold, query_weighted=True)
        k_rope, q_rope, left = split_rope(w, basis, 8, fold)
        q, k = torch.einsum("hdm,nm->nhd", w.q, x), torch.einsum("hdm,nm->nhd", w.k, x).repeat_interleave(2, 1)
        whole = torch.einsum("nhd,nhd->nh", q, k)
        shared = x @ k_rope.T
        rotated = torch.einsum("hrm,nm,nr->nh", q_rope, x, shared)
        rest = torch.einsum("nhd,nhd->nh", q, torch.einsum("hdm,nm->nhd", left, x).repeat_interleave(2, 1))
        assert relative(rotated + rest, whole) < 1e-12


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


@pytest.mark.parametrize("rank", [3, 9])
def test_low_rank_in_a_metric_is_the_best_in_that_metric(rank):
    rows, x = randn(12, 20), randn(200, 20, seed=1)
    moment, metric = moment_of(x), matrix_sqrt(randn(12, 12, seed=2) @ randn(12, 12, seed=2).T)
    found = low_rank(rows, moment, rank, metric)
    error = energy(metric @ (rows - found.up @ found.down), moment)
    best = float(torch.linalg.svdvals(metric @ rows @ torch.linalg.cholesky(moment))[rank:].pow(2).sum())
    assert error == pytest.approx(best, rel=1e-6)
    without = low_rank(rows, moment, rank)
    assert energy(metric @ (rows - without.up @ without.down), moment) > error


def test_matrix_sqrt():
    a = randn(6, 6)
    root = matrix_sqrt(a @ a.T)
    assert torch.allclose(root @ root, a @ a.T, rtol=1e-9, atol=1e-9)
    assert torch.allclose(root, root.T)


@pytest.mark.parametrize("balance", ["ratio", "weighted"])
@torch.no_grad()
def test_balance_leaves_the_full_rank_map(balance):
    """alpha (or the weighted metric) and its inverse cancel; in the metric K and V have equal energy."""
    m = build(config(use_qkv_bias=True)).model.layers[0].attention
    w, moment = Projections.of(m), moment_of(with_ones(randn(1, T, 32)))
    metric = balance_metric(w, w.k, moment, m.dense.weight.unflatten(1, (4, 8)), balance)
    rows = torch.cat((w.k, w.v)).flatten(0, 1)
    found = low_rank(rows, moment, len(rows), metric)
    assert relative(found.up @ found.down, rows) < 1e-11
    k, v = (metric @ rows).chunk(2)
    assert energy(k, moment) == pytest.approx(energy(v, moment), rel=1e-9)
    if balance == "ratio":
        alpha = (energy(rows[:16], moment) / energy(rows[16:], moment)) ** 0.5
        expected = torch.block_diag(torch.eye(16) / alpha, torch.eye(16)).double()
        assert torch.allclose(metric, expected, rtol=1e-9)


@torch.no_grad()
def test_the_weighted_metric_is_query_and_output_error():
    """|S (K error)|^2 is, up to one factor, E (q . error)^2 summed over the queries of a head; for V errors E |W_o error|^2."""
    m = build(config()).model.layers[0].attention
    w, x = Projections.of(m), with_ones(randn(1, 400, 32))
    moment, output = moment_of(x), m.dense.weight.unflatten(1, (4, 8))
    metric = balance_metric(w, w.k, moment, output, "weighted")
    error = randn(5, 4, 8, seed=7)  # five errors of [2 K heads, 2 V heads]
    measured = torch.einsum("pq,nq->np", metric, error.flatten(1)).unflatten(1, (4, 8)).pow(2).sum(-1)
    q = torch.einsum("hdm,nm->nhd", w.q, x).unflatten(1, (2, 2))
    by_query = torch.stack([torch.einsum("nkgd,kd->nkg", q, e).pow(2).sum(-1).mean(0) for e in error[:, :2]])
    by_output = torch.stack([torch.einsum("mkgd,kd->kgm", output.unflatten(1, (2, 2)), e).pow(2).sum((1, 2)) for e in error[:, 2:]])
    ratio = measured[:, :2] / by_query
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-6)
    assert torch.allclose(measured[:, 2:], by_output, rtol=1e-6)


LATENT_NORMS = ("inverse", "rms", "channel", "refit")


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
@torch.no_grad()
def test_latent_norm_modes_are_ordered_on_the_fitted_data(scale):
    """refit <= channel <= rms and inverse; E[1 / rms] is right only where the rms is one."""
    rows, inputs = randn(24, 20), [scale * randn(50, 20, seed=s) * randn(50, 1, seed=s + 9).exp() for s in (1, 2, 3)]
    moment = moment_of(torch.cat(inputs))
    factors = low_rank(rows, moment, 10)
    errors = {}
    for mode in LATENT_NORMS:
        gamma, up = after_norm(factors, rows, inputs, 1e-6, mode)
        wrong = 0.0
        for x in inputs:
            latent = x @ factors.down.T
            normed = gamma * latent / (latent.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            wrong += float((normed @ up.T - x @ rows.T).pow(2).sum())
        errors[mode] = wrong
    assert errors["refit"] <= errors["channel"] * (1 + 1e-9)
    assert errors["channel"] <= min(errors["rms"], errors["inverse"]) * (1 + 1e-9)
    assert errors["refit"] < 0.99 * errors["channel"]
    if scale != 1.0:
        assert errors["rms"] < errors["inverse"]


@torch.no_grad()
def test_latent_norms_are_exact_where_all_rms_are_equal():
    rows, x = randn(24, 10), randn(200, 10, seed=1)
    factors = low_rank(rows, moment_of(x), 10)
    latent = x @ factors.down.T
    x = 3 * x / latent.pow(2).mean(-1, keepdim=True).sqrt()
    for mode in ("rms", "channel", "refit"):
        gamma, up = after_norm(factors, rows, [x], 0.0, mode)
        latent = x @ factors.down.T
        normed = gamma * latent / latent.pow(2).mean(-1, keepdim=True).sqrt()
        assert relative(normed @ up.T, x @ rows.T) < 1e-9


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
    "proportional, half RoPE, biases": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "use_bias": True},
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
    return target, kept


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
    """Rows carry sqrt((nope + rope) / D), which cancels MLA's own scale: 1.2247 at 128 + 64."""
    c = config(num_key_value_heads=1, partial_rotary_factor=0.5)
    source, x = build(c).model.layers[0].attention, randn(3, T, 32)
    target, _ = full_rank_mla(
        c, source, x, dtype=torch.float64, balance="ratio", latent_norm="rms", query_weighted=False, low_rank_query=False
    )
    nope = target.q_proj.weight.unflatten(0, (4, 12))[:, :8]
    plain = split_heads(source, "weight")[0]
    assert relative(nope * target.scale, plain * 8**-0.5) < 1e-12
    assert round((192 / 128) ** 0.5, 4) == 1.2247


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@torch.no_grad()
def test_absorbed_equals_expanded_after_a_conversion(dtype, tolerance):
    c = config(num_key_value_heads=2)
    source, x = build(c, dtype=dtype).model.layers[0].attention, randn(2, T, 32, dtype=dtype)
    m, _ = full_rank_mla(
        c, source, x, dtype=dtype, balance="weighted", latent_norm="channel", query_weighted=True, low_rank_query=True
    )
    call = context(c)
    q_nope, q_rope = m.q_b_proj(m.q_a_proj(x)).unflatten(-1, (4, -1)).split((8, 8), dim=-1)
    latent, k_rope = m.kv_a_proj_with_mqa(x).split((m.rank, m.rope), dim=-1)
    forms = [f(q_nope[:, -5:], q_rope[:, -5:], latent, k_rope, call) for f in (m.absorbed, m.expanded)]
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
        assert kept["kv energy kept"] == pytest.approx(1.0)
        assert relative(target(x, call), source(x, call)) < 1e-8


@torch.no_grad()
def test_inner_tensors_follow_the_inputs_device():
    """Whatever is made without a device lands on `meta` here, and meeting CPU tensors it fails."""
    c = config(q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4)
    source, inputs = build(c).model.layers[0].attention, [with_ones(randn(1, T, 32))]
    target = LatentAttention(c.replace(layer_kinds=("mla", "mla")), 0).double()
    for balance in ("ratio", "weighted"):
        for mode in LATENT_NORMS:
            with torch.device("meta"):
                options = {"rotary": 8, "balance": balance, "latent_norm": mode, "query_weighted": True}
                fill_mla(target, Projections.of(source), source.dense, inputs, **options)
            assert all(p.device.type == "cpu" for p in target.parameters())
