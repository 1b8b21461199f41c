"""The parts of the MLA conversion: each is the best of its kind on the data it was fitted to."""

import pytest
import torch
from tiny_gqa import T, build, config, energy, moment_of, randn, relative, with_ones

from openling.migrate import mla
from openling.migrate.mla import (
    Projections,
    after_norm,
    balance_metric,
    concentrate,
    fill_mla,
    low_rank,
    matrix_sqrt,
    pairs,
    split_rope,
)
from openling.model.ling import LatentAttention, Rope
from openling.ops.rope import rope_frequencies


@pytest.mark.parametrize("fold", [1, 2, 4])
@pytest.mark.parametrize("query_weighted", [False, True])
def test_concentration_keeps_the_most_energy(fold, query_weighted):
    """No other single component per frequency (2000 random ones) explains more of the keys in the chosen metric."""
    c = config()
    w, x = Projections.of(build(c).model.layers[0].attention), with_ones(randn(1, 100, 32, seed=3))
    basis = concentrate(w, moment_of(x), 8, fold, query_weighted=query_weighted)
    key = torch.einsum("ckpfm,nm->ncpkf", pairs(w.k, 8, fold), x).flatten(3)  # [n, 2, p, K f]
    down, up = basis.down[:, 0], basis.up[:, 0]
    assert torch.allclose((down * up).sum(-1), torch.ones(4 // fold).double())  # a projection
    weight = (down / up).sqrt()  # the metric, up to one factor per frequency
    scaled = key * weight
    total = scaled.pow(2).sum((0, 1, 3))
    first = (down / weight) / (down / weight).norm(dim=-1, keepdim=True)
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


@torch.no_grad()
def test_the_weighted_metric_is_query_and_output_error():
    """|S (K error)|^2 is, up to one factor, E (q . error)^2 summed over the queries of a head; for V errors E |W_o error|^2."""
    m = build(config()).model.layers[0].attention
    w, x = Projections.of(m), with_ones(randn(1, 400, 32))
    moment, output = moment_of(x), m.dense.weight.unflatten(1, (4, 8))
    metric = balance_metric(w, w.k, moment, m.dense.weight, "weighted")
    error = randn(5, 4, 8, seed=7)  # five errors of [2 K heads, 2 V heads]
    measured = torch.einsum("pq,nq->np", metric, error.flatten(1)).unflatten(1, (4, 8)).pow(2).sum(-1)
    q = torch.einsum("hdm,nm->nhd", w.q, x).unflatten(1, (2, 2))
    by_query = torch.stack([torch.einsum("nkgd,kd->nkg", q, e).pow(2).sum(-1).mean(0) for e in error[:, :2]])
    by_output = torch.stack(
        [torch.einsum("mkgd,kd->kgm", output.unflatten(1, (2, 2)), e).pow(2).sum((1, 2)) for e in error[:, 2:]]
    )
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


@torch.no_grad()
def test_inner_tensors_follow_the_inputs_device():
    """Whatever is made without a device lands on `meta` here, and meeting CPU tensors it fails."""
    c = config(q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4)
    source, inputs = build(c).model.layers[0].attention, [with_ones(randn(1, T, 32))]
    target = LatentAttention(c.replace(layer_kinds=("mla", "mla")), 0).double()
    for balance, query_weighted in (("ratio", False), ("weighted", True)):
        for mode in LATENT_NORMS:
            with torch.device("meta"):
                options = {"rotary": 8, "balance": balance, "latent_norm": mode, "query_weighted": query_weighted}
                fill_mla(target, Projections.of(source), source.dense, inputs, **options)
            assert all(p.device.type == "cpu" for p in target.parameters())


@pytest.mark.parametrize("balance", ["ratio", "weighted"])
@pytest.mark.parametrize("mode", LATENT_NORMS)
@torch.no_grad()
def test_attention_counts_tokens(balance, mode):
    """A token that receives no attention is as if it were not there, one that receives three times as much as if it stood there
    three times; queries, of which every token asks one, count all alike."""
    c, x = config(kv_lora_rank=12, qk_rope_head_dim=4), with_ones(randn(1, T, 32, seed=5))
    w, dense = Projections.of(build(c).model.layers[0].attention), build(c).model.layers[0].attention.dense.weight
    received = [torch.tensor([0.0, 1.0, 3.0, 2.0]).double().repeat(T // 4)]
    read = x.repeat_interleave(received[0].long(), dim=0)
    moment, attended = moment_of(x), moment_of(read) * len(read) / len(x)
    assert torch.allclose(mla.moment_of([x], received), attended)
    metric = balance_metric(w, w.k, moment, dense, balance, attended)
    rows = torch.cat((w.k, w.v)).flatten(0, 1)
    factors = low_rank(rows, attended, 12, metric)
    norms = after_norm(factors, rows, [x], 1e-6, mode, received)
    scale = {"inverse": 1.5, "rms": 1.5}.get(mode, 1.0)  # means over attention that is 1.5 on average here
    for found, expected in zip(norms, after_norm(factors, rows, [read], 1e-6, mode), strict=True):
        assert torch.allclose(found, expected * (scale if found.dim() == 1 else 1.0))
