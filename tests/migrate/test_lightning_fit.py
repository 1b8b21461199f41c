"""What `best` fits when a layer becomes Lightning (heads to decays, output projection), and the random start of `paper`."""

import numpy as np
import pytest
import torch
from tiny_gqa import SHAPES, build, config, randn, tokens

from openling.migrate.calibrate import Gram, LayerStep, walk
from openling.migrate.convert import derive
from openling.migrate.lightning import (
    look_back,
    match_heads,
    randomise,
    refit_norm_and_gate,
    refit_output,
    replicate,
    split_heads,
    widen,
)
from openling.model.ling import LightningAttention, Ling
from openling.ops.lightning import log_decay
from openling.ops.rope import apply_rope


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


def step_of(model: Ling, windows) -> LayerStep:
    """The first layer, as a walk shows it."""
    return next(walk(model, model, windows, bf16=False))


def explicit_look_back(m, step: LayerStep) -> torch.Tensor:
    """The T x T matrix of probabilities written out in FP64, from queries and keys made in the mode of the caller (autocast)."""
    sums, rows = 0.0, 0
    for x in step.inputs():
        q, k, _ = m.query_key_value(x).unflatten(-1, (-1, m.dim)).split((m.heads, m.kv_heads, m.kv_heads), 2)
        if m.qk_norm:
            q, k = m.query_layernorm(q), m.key_layernorm(k)
        q, k = (apply_rope(y, *step.teacher_call.tables.head).double() for y in (q, k))
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(m.heads // m.kv_heads, 2)) * m.dim**-0.5
        total = x.shape[1]
        p = scores.masked_fill(torch.ones(total, total).triu(1).bool(), float("-inf")).softmax(-1)
        position = torch.arange(total, dtype=torch.float64)
        sums = sums + (position[:, None] - position).mul(p).sum((0, 2, 3))
        rows += x.shape[0] * total
    return sums / rows


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_look_back_equals_the_explicit_matrix(shape):
    """d_h = mean over t of t - sum_s p_ts s."""
    model = build(config(**SHAPES[shape]))
    step = step_of(model, [tokens(2), tokens(1)])
    found = look_back(step.teacher.attention, step)
    assert torch.allclose(found, explicit_look_back(step.teacher.attention, step), rtol=1e-5)  # FP32 inside
    assert found.min() > 0


@torch.no_grad()
def test_look_back_is_not_rounded_to_bf16_under_autocast():
    """BF16 holds no odd integers beyond 256: positions may not ride in it, even where queries and keys are BF16."""
    model = build(config(num_attention_heads=1, num_key_value_heads=1), dtype=torch.float32)
    walker = walk(model, model, [tokens(1, 600)], bf16=True)
    step = next(walker)
    found, expected = (f(step.teacher.attention, step) for f in (look_back, explicit_look_back))
    walker.close()
    assert torch.allclose(found, expected, rtol=1e-5)


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
    windows = [tokens(3), tokens(2)]
    step = next(walk(teacher, student, windows, bf16=False))
    target = step.student.attention
    widen(step.teacher.attention, target)
    z = torch.cat([target.mix(x, step.student_call).flatten(0, 1) for x in step.inputs()]).numpy()
    y = torch.cat([y.flatten(0, 1) for y in step.targets()]).numpy()
    if bias:
        assert torch.equal(target.dense.bias, step.teacher.attention.dense.bias)
        y = y - target.dense.bias.numpy()
    before = np.square(y - z @ target.dense.weight.numpy().T).sum() / np.square(y).sum()
    reported = refit_output(step, damping=1e-12)
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
        step = next(walk(teacher, student, [tokens(2)], bf16=False))
        widen(step.teacher.attention, step.student.attention)
        old = step.student.attention.dense.weight.clone()
        errors.append(refit_output(step, damping=damping))
        distances.append(float((step.student.attention.dense.weight - old).norm()))
    assert errors == sorted(errors)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_an_error_of_nothing_is_not_negative(seed):
    """A model that is its own student: what is left is the rounding of two sums of one size, of either sign."""
    teacher = build(config(num_hidden_layers=1, layer_kinds=("gqa",)), seed)
    step = next(walk(teacher, teacher, [tokens(2)], bf16=False))
    assert 0 <= refit_output(step, damping=1e-3) < 1e-12


def fit_step(seed=0, **changes):
    """The step of a widened Lightning layer, on two batches, and the order of its heads."""
    c = config(num_hidden_layers=1, layer_kinds=("gqa",), **changes)
    teacher = build(c, seed)
    student = derive(teacher, c.replace(layer_kinds=("lightning",)))
    step, order = next(walk(teacher, student, [tokens(3), tokens(2)], bf16=False)), torch.tensor([2, 0, 3, 1])
    widen(step.teacher.attention, step.student.attention, order=order)
    return step, order


def channels(step, order):
    """Teacher's heads in the student's order, and the student's outputs in front of `dense`, [N, C]."""
    x = torch.cat(list(step.inputs()))
    y = step.teacher.attention.mix(x, step.teacher_call).unflatten(-1, (4, -1))[:, :, order].flatten(2)
    return y.flatten(0, 1), step.student.attention.mix(x, step.student_call).flatten(0, 1)


@torch.no_grad()
def test_group_norm_is_least_squares_by_channel():
    step, order = fit_step()
    y, half = channels(step, order)  # unit weights and a gate of one half
    expected = [np.linalg.lstsq(half[:, [c]].numpy(), y[:, c].numpy(), rcond=None)[0][0] for c in range(y.shape[1])]
    reported = refit_norm_and_gate(step, order=order, damping=1e-3, gate=False)
    assert np.allclose(step.student.attention.g_norm.weight.numpy(), expected, rtol=1e-6)
    assert not step.student.attention.g_proj.weight.any()
    y, found = channels(step, order)
    assert reported == pytest.approx(float((y - found).square().sum() / y.square().sum()))


@torch.no_grad()
def test_a_gate_that_the_heads_really_have_is_found():
    """The teacher's heads are replaced by gated outputs with small known gates: the fit explains most of what no norm can."""
    step, order = fit_step()
    mixer = step.student.attention
    gates, gamma = 0.5 * randn(*mixer.g_proj.weight.shape, seed=4), 1 + randn(32, seed=5).abs()
    mixer.g_proj.weight.copy_(gates)
    mixer.g_norm.weight.copy_(gamma)
    heads = {
        len(x): mixer.mix(x, step.student_call).unflatten(-1, (4, -1))[:, :, order.argsort()].flatten(2) for x in step.inputs()
    }
    step.teacher.attention.mix = lambda x, call: heads[len(x)]
    mixer.g_proj.weight.zero_()
    alone = refit_norm_and_gate(step, order=order, damping=1e-6, gate=False)
    both = refit_norm_and_gate(step, order=order, damping=1e-6, gate=True)
    assert both < 0.5 * alone


@torch.no_grad()
def test_a_gate_is_taken_only_where_the_last_batch_gains():
    """Against norms alone, on the batch that the direction was not fitted to."""
    for seed in range(3):
        errors = {}
        for gate in (False, True):
            step, order = fit_step(seed)
            refit_norm_and_gate(step, order=order, damping=1e-2, gate=gate)
            step.student_h, step.teacher_h = step.student_h[-1:], step.teacher_h[-1:]
            y, found = channels(step, order)
            best = (y * found).sum(0) / (found * found).sum(0)  # the norm of a channel is free
            errors[gate] = (y - best * found).square().sum(0)
        assert (errors[True] <= errors[False] * (1 + 1e-9)).all()
        assert errors[True].sum() < errors[False].sum()


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
