"""Latent ranks under one total: the best shares, and latents that use a part of their width."""

import itertools

import pytest
import torch
from small_runs import Place, openling_command, refused
from tiny_gqa import T, build, config, context, randn, relative, with_ones

from openling.config.migrate import Conversion, preset
from openling.migrate.convert import to_mla
from openling.migrate.layout import target_config
from openling.migrate.mla import Projections, fill_mla, kv_spectrum
from openling.migrate.ranks import share_ranks
from openling.model.ling import LatentAttention


@pytest.mark.parametrize(("mean", "widest"), [(1, 5), (2, 5), (3, 5), (3, 3), (5, 5)])
def test_shares_are_the_best_of_all(mean, widest):
    """Against every way to share the budget, by the sum of relative errors."""
    spectra = [randn(6, seed=s).square().sort(descending=True).values * 10.0**s for s in (1, 2, 3)]

    def error(ranks) -> float:
        return sum(float(s[r:].sum() / s.sum()) for s, r in zip(spectra, ranks, strict=True))

    found = share_ranks(spectra, mean, widest)
    possible = [r for r in itertools.product(range(1, widest + 1), repeat=3) if sum(r) == 3 * mean]
    assert sum(found) == 3 * mean
    assert error(found) == pytest.approx(min(map(error, possible)))


def test_a_budget_beyond_the_spectra_is_not_spent():
    assert share_ranks([torch.tensor([2.0, 1.0]), torch.tensor([3.0])], 4, 8) == [2, 1]


@pytest.mark.parametrize("latent_norm", ["rms", "channel", "refit"])
@torch.no_grad()
def test_unused_dims_are_zero_and_change_nothing(latent_norm):
    """A latent of 16 dims that uses 10 says what one of 10 says; its norm's other count is made good."""
    c = config()
    source, x, call = build(c).model.layers[0].attention, randn(3, T, 32, seed=5), context(c)
    outputs, inputs = [], [with_ones(part) for part in x.split(1)]
    for width in (10, 16):
        target = LatentAttention(c.replace(layer_kinds=("mla", "mla"), kv_lora_rank=width), 0).double()
        target.kv_a_layernorm.eps = 1e-12 * 10 / width  # the eps of a norm does not scale
        options = {"balance": "weighted", "latent_norm": latent_norm, "query_weighted": True}
        kept = fill_mla(target, Projections.of(source), source.dense, inputs, rotary=8, rank=10, **options)
        outputs.append(target(x, call))
        spectrum = kv_spectrum(
            Projections.of(source), source.dense.weight, inputs, rotary=8, rope=8, balance="weighted", query_weighted=True
        )
        assert kept.energy["kv energy kept"] == pytest.approx(float(spectrum[:10].sum() / spectrum.sum()))
    assert not target.kv_a_proj_with_mqa.weight[10:16].any()
    assert not target.kv_b_proj.weight[:, 10:].any()
    assert relative(outputs[1], outputs[0]) < (1e-4 if latent_norm == "refit" else 1e-10)  # refit: damped by the mean over dims


@torch.no_grad()
def test_layers_share_what_a_conversion_may_use():
    """The deeper spectrum gets more; the written widths stay those of the config."""
    teacher = build(config(), dtype=torch.float32)
    v = teacher.model.layers[0].attention.query_key_value.weight[-16:]
    v[2:] = v[:2].repeat(7, 1)  # two directions are all there is in these values
    full = target_config(teacher.config, group_size=2, kv_lora_rank=24).replace(layer_kinds=("mla", "mla"))
    options = Conversion(**{**preset("best").conversion.model_dump(), "kv_rank_budget": 14})
    ids = [torch.randint(50, (3, T), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    hybrid, found = to_mla(teacher, full, ids, options, on_layer=lambda i: None, bf16=False)
    used = [int(a.value) for a in found.approximations if a.step == "latent rank"]
    assert sum(used) == 28
    assert used[0] < used[1]
    for layer, rank in zip(hybrid.model.layers, used, strict=True):
        assert layer.attention.kv_a_proj_with_mqa.weight.shape[0] == 24 + 8
        assert (layer.attention.kv_a_proj_with_mqa.weight[:24].abs().sum(1) > 0).sum() == rank


def test_refusals(place: Place, tmp_path):
    budget = ["--conversion.kv_rank_budget", "400"]
    refused(place.migrate(tmp_path / "a", *budget), "kv_rank_budget", "1 to kv_lora_rank")
    for flag in ("--weights-only", "--dry-run"):
        refused(openling_command("convert", place.teacher, tmp_path / "b", flag, *budget), "openling migrate")


def test_a_migration_with_a_budget_can_be_tried(place: Place, tmp_path):
    tried = place.migrate(tmp_path / "a", "--dry-run", "--conversion.kv_rank_budget", "8")
    assert tried.code == 0, tried.err
    assert "held in memory" in tried.err
