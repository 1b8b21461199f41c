"""What conversions and measures find out on the way, against small computations of another kind in FP64."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import GOLDEN
from tiny_gqa import build, config, energy, moment_of, randn, tokens, with_ones

import openling
from openling.config.load import override
from openling.config.migrate import preset
from openling.errors import UserError
from openling.migrate.convert import derive, to_lightning, to_mla
from openling.migrate.findings import CURVE_POINTS, Spectrum
from openling.migrate.measure import layer_measures
from openling.migrate.mla import low_rank, matrix_sqrt
from openling.model.config import ModelConfig
from openling.model.ling import Ling, SparseMoE

QUIET = {"on_layer": lambda i: None, "bf16": False}
OPTIONS = preset("best").conversion


def hybrid(c: ModelConfig, *kinds: str) -> ModelConfig:
    return c.replace(layer_kinds=kinds, kv_lora_rank=8, q_lora_rank=12)


# ---------------------------------------------------------------------------------------------------------------------
# Energy against rank
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_spectrum_is_that_of_the_activations(weighted: bool) -> None:
    """Eigenvalues of small second moments are squared singular values of all activations, which are never stored elsewhere."""
    rows, x = randn(10, 9), with_ones(randn(50, 8))
    metric = matrix_sqrt(randn(10, 10, seed=1) @ randn(10, 10, seed=1).T) if weighted else None
    squared = torch.linalg.svdvals((rows if metric is None else metric @ rows) @ x.T).square()
    found = low_rank(rows, moment_of(x), 4, metric)
    share = squared.cumsum(0) / squared.sum()
    curve = Spectrum.of(3, "kv", found.spectrum, 4)
    assert (curve.layer, curve.part, curve.rank, curve.ranks) == (3, "kv", 4, list(range(1, 10)))
    assert curve.energy == pytest.approx(share[:9].tolist(), abs=1e-12)  # nine inputs: a tenth row adds nothing
    assert curve.energy[3] == pytest.approx(found.energy_kept, abs=1e-12)
    if not weighted:
        left = rows - found.up @ found.down
        assert 1 - curve.energy[3] == pytest.approx(energy(left, moment_of(x)) / energy(rows, moment_of(x)), abs=1e-12)


def test_a_long_spectrum_is_thinned_and_keeps_the_chosen_rank() -> None:
    squared = torch.arange(2048, 0, -1, dtype=torch.float64)
    curve = Spectrum.of(0, "query", squared, 1537)
    assert len(curve.ranks) <= CURVE_POINTS + 2
    assert {1, 1537, 2048} <= set(curve.ranks)
    exact = [sum(range(2048, 2048 - r, -1)) / sum(range(2049)) for r in curve.ranks]
    assert curve.energy == pytest.approx(exact, rel=1e-12)


def test_a_conversion_reports_the_curve_of_every_mla_layer() -> None:
    c = config()
    student, found = to_mla(build(c), hybrid(c, "gqa", "mla"), [tokens(2)], OPTIONS, **QUIET)
    # No more ranks than rows, 32, or than inputs: 32 and the bias.
    assert [(s.layer, s.part, s.rank, s.ranks[-1]) for s in found.spectra] == [(1, "kv", 8, 32), (1, "query", 12, 33)]
    kept = {a.measure: a.value for a in found.approximations if a.step == "MLA factors"}
    for curve in found.spectra:
        assert curve.energy == sorted(curve.energy)
        assert curve.energy[-1] == pytest.approx(1.0)
        assert curve.energy[curve.ranks.index(curve.rank)] == pytest.approx(kept[f"{curve.part} energy kept"], abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Half-lives against look-back
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def distances(model: Ling, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Mean look-back of each head by whole attention matrices, [H]."""
    seen, count = [], ids.shape[1]
    attention = model.model.layers[layer].attention
    hook = attention.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(ids)
    hook.remove()
    position = torch.arange(count, dtype=torch.float64)
    frequency = model.config.rope_theta ** (-torch.arange(0, attention.dim, 2, dtype=torch.float64) / attention.dim)
    turns = torch.polar(torch.ones(1, dtype=torch.float64), position[:, None] * frequency)[:, None]
    qkv = attention.query_key_value(seen[0]).unflatten(-1, (-1, attention.dim))
    q, k, _ = qkv.split((attention.heads, attention.kv_heads, attention.kv_heads), dim=2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(*x.chunk(2, -1)) * turns
        return torch.cat((turned.real, turned.imag), -1)

    k = rotate(k).repeat_interleave(attention.heads // attention.kv_heads, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", rotate(q), k) * attention.dim**-0.5
    scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf)
    return (position - scores.softmax(-1) @ position).mean((0, 2))


@pytest.mark.parametrize("matched", [True, False])
def test_head_spans_belong_to_the_heads_they_are_listed_for(matched: bool) -> None:
    c, ids = config(), tokens(2)
    teacher = build(c)
    options = OPTIONS.model_copy(update={"match_heads": matched})
    student, found = to_lightning(teacher, hybrid(c, "lightning", "gqa"), [ids], options, seed=0, **QUIET)
    (spans,) = found.heads
    assert spans.layer == 0
    attention, source = student.model.layers[0].attention, teacher.model.layers[0].attention
    # A state that is left alone for a half-life holds one half.
    left = [math.exp(float(g) * span) for g, span in zip(attention.log_decay(torch.zeros(1)), spans.half_life, strict=True)]
    assert left == pytest.approx([0.5] * 4, rel=1e-6)
    # A student's head is the teacher's whose query rows it has.
    ours, theirs = (a.query_key_value.weight.unflatten(0, (-1, a.dim))[:4] for a in (attention, source))
    order = [next(p for p in range(4) if torch.equal(head, theirs[p])) for head in ours]
    assert (order == [0, 1, 2, 3]) == (not matched)
    assert spans.look_back == pytest.approx(distances(teacher, ids, 0)[order].tolist(), rel=1e-5)  # FP32 inside
    if matched:
        far = [back for _, back in sorted(zip(spans.half_life, spans.look_back, strict=True))]
        assert far == sorted(far)


# ---------------------------------------------------------------------------------------------------------------------
# Router drift
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def routed(model: Ling, ids: torch.Tensor) -> dict[int, tuple[list[set[int]], torch.Tensor]]:
    """By layer: each token's experts, and its normalised scores, in an ordinary forward pass."""
    layers = {i: layer.mlp for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, SparseMoE)}
    inputs, hooks = {}, []
    for i, mlp in layers.items():
        mlp.chosen = []
        hooks.append(mlp.gate.register_forward_hook(lambda m, args, out, i=i: inputs.update({i: args[0]})))
    model.mtp_logits(ids, model.model(ids)) if model.model.mtp_layers() else model(ids)
    for hook in hooks:
        hook.remove()
    out = {}
    for i, mlp in layers.items():
        (chosen,), mlp.chosen = mlp.chosen, None
        logits = inputs[i] @ mlp.gate.weight.T
        scores = torch.sigmoid(logits) if mlp.gate.config.score_function == "sigmoid" else logits.softmax(-1)
        out[i] = ([set(row.tolist()) for row in chosen], scores / scores.sum(-1, keepdim=True))
    return out


@pytest.fixture(scope="module")
def moe() -> Ling:
    return openling.load(GOLDEN / "ling-2.0-tiny").model.double()


@torch.no_grad()
def test_router_drift_is_that_of_whole_forward_passes(moe: Ling) -> None:
    c = moe.config
    student = derive(moe, c)
    noise = torch.Generator().manual_seed(0)
    for layer in student.model.layers:  # another attention, as a conversion leaves it
        old = layer.attention.dense.weight
        layer.attention.dense.weight = torch.nn.Parameter(old + 0.5 * old.std() * torch.randn(old.shape, generator=noise))
    ids = torch.randint(c.vocab_size, (3, 25), generator=torch.Generator().manual_seed(1))
    found = {row["layer"]: row for row in layer_measures(student, moe, ids).routers}
    theirs, ours = routed(moe, ids), routed(student, ids)
    hidden = [i for i in range(c.num_hidden_layers) if c.is_moe(i)]
    assert set(found) == {i for i in range(len(moe.model.layers)) if c.is_moe(i)}
    for i in hidden:
        (old, p), (new, q) = theirs[i], ours[i]
        changed = sum(a != b for a, b in zip(old, new, strict=True)) / 75
        kept = sum(len(a & b) for a, b in zip(old, new, strict=True)) / (75 * c.num_experts_per_tok)
        assert 0 < changed < 1
        assert found[i]["changed"] == pytest.approx(changed)
        assert found[i]["kept"] == pytest.approx(kept)
        assert found[i]["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)


def test_the_same_attention_sends_tokens_the_same_way(moe: Ling) -> None:
    rows = layer_measures(moe, moe, torch.randint(moe.config.vocab_size, (1, 9))).routers
    assert rows
    assert all((row["changed"], row["kept"], row["kl"]) == (0.0, 1.0, 0.0) for row in rows)
    assert layer_measures(build(config()), build(config()), tokens(1)).routers == []


@pytest.mark.parametrize("wrong", ["lengths 256,128", "lengths 0", "depths []", "depths [1.5]", "samples 0"])
def test_a_grid_that_cannot_be_asked(wrong: str) -> None:
    name, value = wrong.split()
    with pytest.raises(UserError, match="recall"):
        override(preset("best"), [f"--recall.{name}", value])
