"""RoRoPE with frequency folding: how the shared rotated key draws on neighbouring frequencies, and which fold a layer takes."""

import pytest
import torch
from tiny_gqa import T, build, config, context, moment_of, randn, relative, with_ones

from openling.config.migrate import Conversion, preset
from openling.errors import UserError
from openling.migrate.convert import to_mla
from openling.migrate.fold import attention_outputs, attention_received, best_fold, check_fold, folds, partly_rotated_outputs
from openling.migrate.layout import target_config
from openling.migrate.mla import Projections, concentrate, pairs, split_rope
from openling.ops.attention import softmax_attention
from openling.ops.rope import apply_rope


def layer(**changes):
    c = config(head_dim=16, **changes)
    return c, build(c).model.layers[0].attention, with_ones(randn(2, T, 32, seed=3))


@pytest.mark.parametrize(
    ("rotary", "rope", "expected"), [(64, 64, [1, 2, 4, 8, 16, 32]), (64, 32, [2, 4, 8, 16, 32]), (12, 12, [1, 2])]
)
def test_possible_folds(rotary, rope, expected):
    assert folds(rotary, rope) == expected
    for fold in ("auto", 1, *expected):
        check_fold(fold, rotary, rope)
    with pytest.raises(UserError, match="rope_fold"):
        check_fold(3, rotary, rope)


@pytest.mark.parametrize(("rope", "fold"), [(16, 2), (16, 8), (8, 4), (4, 8)])
@torch.no_grad()
def test_components_of_a_fold_are_the_principal_ones(rope, fold):
    """Per group, the kept energy is the sum of the largest singular values of its keys: an SVD of the keys themselves."""
    _, m, x = layer()
    w, keep = Projections.of(m), fold * rope // 16
    basis = concentrate(w, moment_of(x), 16, fold, query_weighted=False, keep=keep)
    key = torch.einsum("ckpfm,nm->pncfk", pairs(w.k, 16, fold), x)  # [p, N, 2, f, K]
    key = key.permute(0, 1, 2, 4, 3).flatten(3).flatten(1, 2)  # [p, N * 2, K * f]
    squared = torch.linalg.svdvals(key).square()
    assert basis.energy_kept == pytest.approx(float(squared[:, :keep].sum() / squared.sum()))
    products = torch.einsum("pia,pja->pij", basis.down, basis.up)
    assert torch.allclose(products, torch.eye(keep).double().expand_as(products))  # a projection, query-weighted or not
    weighted = concentrate(w, moment_of(x), 16, fold, query_weighted=True, keep=keep)
    assert torch.allclose(torch.einsum("pia,pja->pij", weighted.down, weighted.up), torch.eye(keep).double().expand_as(products))


@torch.no_grad()
def test_a_larger_fold_keeps_more_energy():
    _, m, x = layer()
    w = Projections.of(m)
    kept = [concentrate(w, moment_of(x), 16, fold, query_weighted=False, keep=fold).energy_kept for fold in (1, 2, 4, 8)]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


@pytest.mark.parametrize(("rope", "fold"), [(16, 1), (16, 4), (8, 2), (8, 8)])
@torch.no_grad()
def test_nothing_is_lost_at_position_zero(rope, fold):
    """Unrotated, the shared key and the rest add up to the very scores, whatever the fold."""
    c, m, x = layer(qk_rope_head_dim=rope)
    w = Projections.of(m)
    basis = concentrate(w, moment_of(x), 16, fold, query_weighted=True, keep=fold * rope // 16)
    k_rope, q_rope, left = split_rope(w, basis, 16, fold)
    assert (k_rope.shape, q_rope.shape) == ((rope, 33), (4, rope, 33))
    q, k = (torch.einsum("hdm,nm->hnd", y, x) for y in (w.q, w.k.repeat_interleave(2, 0)))
    rest, turned = (torch.einsum("hdm,nm->hnd", y, x) for y in (left.repeat_interleave(2, 0), q_rope))
    found = q @ rest.mT + turned @ (x @ k_rope.T).T
    assert relative(found, q @ k.mT) < 1e-12


@torch.no_grad()
def test_components_take_their_own_frequencies_where_each_lives_on_one():
    """One head whose odd frequencies hold little energy: the two components of a fold are the two frequencies."""
    c, m, x = layer(num_key_value_heads=1)
    m.query_key_value.weight.unflatten(0, (-1, 16))[4, [1, 3, 5, 7, 9, 11, 13, 15]] *= 1e-3  # odd frequencies: little energy
    w, tables = Projections.of(m), context(c).tables
    basis = concentrate(w, moment_of(x), 16, 2, query_weighted=False, keep=2)
    k_rope, q_rope, left = split_rope(w, basis, 16, 2)
    exact, found = attention_outputs(w, x, tables, 16), partly_rotated_outputs(w, x, tables, k_rope, q_rope, left)
    assert relative(found, exact) < 1e-3


@torch.no_grad()
def test_errors_are_those_of_the_mixers_own_output():
    """The exact outputs are what `dense` reads, and fold 1 of one K/V head is exact."""
    c, m, x = layer(num_key_value_heads=1)
    w, call = Projections.of(m), context(c)
    exact = attention_outputs(w, x, call.tables, 16)
    assert relative(exact.flatten(2), m.mix(x[:, :-1].unflatten(0, (2, T)), call)) < 1e-5
    fold, errors = best_fold(w, [x, x], call.tables, rotary=16, rope=16, query_weighted=True)
    assert fold == 1
    assert list(errors) == [1, 2]  # no further: the error has risen
    assert errors[1] < 1e-9 < errors[2]


@torch.no_grad()
def test_auto_takes_what_neighbours_share():
    """Two heads whose keys repeat at neighbouring frequencies, at almost equal angles: folding them pays, and is found."""
    c, m, x = layer(rope_theta=1.0001)
    k = m.query_key_value.weight.unflatten(0, (-1, 16))[4:6]
    k[:, 8:] = 0  # the imaginary half is empty, so that nothing but the pairing counts
    k[1, 1], k[1, 0] = k[0, 0], k[0, 1]  # head 1 has head 0's keys at swapped frequencies
    w = Projections.of(m)
    fold, errors = best_fold(w, [x, x], context(c).tables, rotary=16, rope=16, query_weighted=False)
    assert fold > 1
    assert errors[fold] < 0.9 * errors[1]


@torch.no_grad()
def test_a_conversion_takes_the_fold_it_is_told():
    teacher = build(config(), dtype=torch.float32)
    full = target_config(teacher.config, group_size=2).replace(layer_kinds=("mla", "mla"))
    ids = [torch.randint(50, (3, T), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    rows = {}
    for fold in (1, 2, 4, "auto"):
        options = Conversion(**{**preset("best").conversion.model_dump(), "rope_fold": fold})
        _, found = to_mla(teacher, full, ids, options, on_layer=lambda i: None, bf16=False)
        rows[fold] = [a for a in found.approximations if a.layer == 0]
    kept = {fold: next(a.value for a in found if a.measure == "rope energy kept") for fold, found in rows.items()}
    assert kept[1] < kept[2] < kept[4]
    measured = {a.measure.split()[-1]: a.value for a in rows["auto"] if a.step == "RoPE folding"}
    best = min(measured, key=lambda f: measured[f])
    assert kept["auto"] == kept[int(best)]


@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 1}, {"partial_rotary_factor": 0.5}])
@torch.no_grad()
def test_attention_received(heads):
    """The column sums of the mixer's own softmax, read through its values: one-hot values of every position."""
    c, m, x = layer(**heads)
    w, tables = Projections.of(m), context(c).tables
    received = attention_received(w, x, tables).unflatten(0, (2, T))
    assert torch.allclose(received.sum(-1), torch.full((2,), float(T)).double(), rtol=1e-6)
    q, k = (apply_rope(torch.einsum("hdm,nm->nhd", r, x).unflatten(0, (2, T)), *tables.head) for r in (w.q, w.k))
    identity = torch.eye(T, dtype=x.dtype)[None, :, None].expand(2, T, w.k.shape[0], T)
    rows = softmax_attention(q, k, identity, scale=16**-0.5)  # [2, T queries, H, T keys]
    assert relative(received, rows.mean(2).sum(1)) < 1e-5


@torch.no_grad()
def test_attention_received_is_not_rounded_to_bf16_under_autocast():
    """As the conversions call it on a GPU: a weight of every token, not to be had in 8 bits."""
    c, m, x = layer()
    w, tables = Projections.of(m), context(c).tables
    expected = attention_received(w, x, tables)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_received(w, x, tables), expected)
