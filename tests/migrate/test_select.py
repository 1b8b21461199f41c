"""Which layers become MLA: ratios, pure linear, named and selected layers, from the config to the finished folder."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_runs import Place, make_llama, openling_command, refused
from tiny_gqa import build, config, context, tokens
from transformers import AutoModelForCausalLM

import openling
from openling.config.load import override
from openling.config.migrate import Conversion, Layout
from openling.errors import UserError
from openling.migrate import select
from openling.migrate.convert import to_lightning
from openling.migrate.layout import lightning_stage, mla_stage, target_config
from openling.migrate.measure import layer_measures
from openling.migrate.select import select_layers
from openling.migrate.stack import FolderStack
from openling.model.config import read_ling, write_ling
from openling.ops.cpu import settle_bf16_matmuls
from openling.ops.rope import apply_rope
from openling.weights.export import save
from openling.weights.folder import open_folder

QUIET = {"on_layer": lambda i: None, "bf16": False}
OPTIONS = Conversion()


def source(layers=8, **changes):
    return config(num_hidden_layers=layers, layer_kinds=("gqa",) * layers, **changes)


@pytest.mark.parametrize(
    ("layers", "options", "mla", "group"),
    [
        (16, {"group_size": 2}, range(1, 16, 2), 2),
        (16, {"group_size": 4}, range(3, 16, 4), 4),
        (16, {}, (7, 15), 8),
        (16, {"group_size": 16}, (15,), 16),
        (16, {"mla_layers": "none"}, (), None),
        (16, {"mla_layers": (0, 7, 8)}, (0, 7, 8), None),
        (16, {"mla_layers": (7, 15)}, (7, 15), 8),
        # Selected layers are as many as even ones; until they are known these stand for them, whatever divides.
        (30, {"mla_layers": "selected", "group_size": 8}, (7, 15, 23), None),
    ],
)
def test_ratios_and_placements(layers, options, mla, group):
    c = target_config(source(layers), **options)
    assert [i for i, kind in enumerate(c.layer_kinds) if kind == "mla"] == list(mla)
    assert c.layer_kinds.count("lightning") == layers - len(mla)
    assert c.layer_group_size == group
    assert read_ling(json.loads(json.dumps(write_ling(c)))) == c


@pytest.mark.parametrize("chosen", [(3, 1), (1, 1), (8,), (-1,), tuple(range(8))])
def test_impossible_layers_are_refused(chosen):
    with pytest.raises(UserError, match="rising numbers from 0 to 7"):
        target_config(source(), mla_layers=chosen)


def test_both_stages_of_an_irregular_layout():
    half = lightning_stage(source(), {"mla_layers": (2, 3)})
    assert half.layer_kinds[2:4] == ("gqa", "gqa")
    whole = mla_stage(half, {})
    assert [i for i, kind in enumerate(whole.layer_kinds) if kind == "mla"] == [2, 3]
    assert whole.layer_group_size is None
    assert mla_stage(source(), {}).layer_group_size == 1


def test_a_pure_linear_teacher_keeps_its_mtp_attention():
    c = target_config(source(num_nextn_predict_layers=1, mtp_layer_kind="gqa"), mla_layers="none")
    assert (set(c.layer_kinds), c.layer_kind(8)) == ({"lightning"}, "gqa")


@pytest.mark.parametrize(
    ("text", "value"), [("ling", "ling"), ("none", "none"), ("5,11,17", (5, 11, 17)), ("[5, 11]", (5, 11)), ("5", (5,))]
)
def test_how_a_layout_is_typed(text, value):
    assert override(Layout(), ["--mla_layers", text]).mla_layers == value


def test_a_misspelt_layout():
    with pytest.raises(UserError, match="ling, selected, none, or layer numbers such as 5,11,17"):
        override(Layout(), ["--mla_layers", "evenly"])


@torch.no_grad()
# BF16 is for the fits; the scores of FP32 weights are FP32 ones, whose logits' rounding moves them by 1e-6 of themselves or so.
@pytest.mark.parametrize(("dtype", "bf16", "within"), [(torch.float64, False, 1e-6), (torch.float32, True, 1e-4)])
def test_kl_scores_are_those_of_models_with_one_layer_converted(dtype, bf16, within):
    """Against whole models, converted one layer at a time, by the plain formula on their logits."""
    teacher = build(source(4), dtype=dtype)
    ids = [tokens(3), tokens(2), tokens(4)]
    target = target_config(teacher.config, group_size=2)
    found = select_layers(teacher, target, ids, Conversion(layer_score="kl"), seed=0, bf16=bf16)
    expected = F.log_softmax(teacher(ids[-1])[:, :-1], -1)
    for layer, score in enumerate(found.scores):
        kinds = tuple("lightning" if i == layer else "gqa" for i in range(4))
        student, _ = to_lightning(teacher, target.replace(layer_kinds=kinds), ids[:-1], OPTIONS, seed=0, **QUIET | {"bf16": bf16})
        q = F.log_softmax(student(ids[-1])[:, :-1], -1)
        kl = (expected.exp() * (expected - q)).sum(-1).mean()
        assert score == pytest.approx(float(kl), rel=within)
    order = sorted(range(4), key=lambda i: found.scores[i])
    assert found.layers == tuple(sorted(order[2:]))
    assert [a.value for a in found.findings("kl").approximations] == list(found.scores)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_near_scores_are_those_of_models_with_one_layer_that_reads_near(monkeypatch, qk_norm):
    """Against whole models whose one layer's attention is written out with the far scores at minus infinity."""
    near = 6
    monkeypatch.setattr(select, "NEAR", near)
    teacher = build(source(4, gqa_qk_norm=qk_norm))
    ids = [tokens(3), tokens(4)]
    found = select_layers(
        teacher, target_config(teacher.config, group_size=2), ids, Conversion(layer_score="near"), seed=0, bf16=False
    )
    expected = F.log_softmax(teacher(ids[-1])[:, :-1], -1)
    for layer, score in enumerate(found.scores):
        student = copy.deepcopy(teacher)
        student.model.layers[layer].attention.forward = partial(plain_near, student.model.layers[layer].attention, near)
        q = F.log_softmax(student(ids[-1])[:, :-1], -1)
        kl = (expected.exp() * (expected - q)).sum(-1).mean()
        assert score == pytest.approx(float(kl), rel=1e-6)
        assert score > 1e-4
    assert [a.value for a in found.findings("near").approximations] == list(found.scores)


def test_a_layer_in_which_nothing_is_far_scores_nothing_in_bf16_passes(monkeypatch):
    """From 64 tokens on a CPU computes causal attention in blocks, and one that reads near with a mask: two roundings of the same
    outputs, 1e-6 of them in FP32, in which a divergence is of second order. In BF16 (4e-3) they were 0.001 nats apart."""
    monkeypatch.setattr(select, "NEAR", 130)
    teacher, ids = build(source(8), dtype=torch.float32), [tokens(2, 130)]
    found = select_layers(teacher, target_config(teacher.config), ids, Conversion(layer_score="near"), seed=0, bf16=True)
    assert max(map(abs, found.scores)) < 1e-6


def test_windows_in_which_no_token_is_far_are_refused(place: Place, tmp_path):
    words = ["--layout", "selected", "--group-size", "3", "--stage", "lightning"]
    refused(place.migrate(tmp_path / "out", *words), "--text.sequence_length above 64")
    assert place.migrate(tmp_path / "by-kl", *words, "--conversion.layer_score", "kl").code == 0
    assert place.migrate(tmp_path / "out", *words, **{"text.sequence_length": 80}).code == 0


def looks_at_the_last_token(attention):
    """Queries and keys become one vector each, and the query's is that of the key one position on."""
    dim, heads = attention.dim, attention.heads + attention.kv_heads
    key = torch.full((1, 1, 1, dim), 20.0, dtype=torch.float64)
    cos, sin = (table[:, 1:2] for table in context(source(4)).tables.head)
    query = apply_rope(key, cos, -sin)
    attention.query_key_value.weight[: heads * dim] = 0
    vectors = [query.flatten()] * attention.heads + [key.flatten()] * attention.kv_heads
    attention.query_key_value.bias[: heads * dim] = torch.cat(vectors)


def plain_near(attention, near, x, call, cache=None):
    heads, groups, dim = attention.heads, attention.heads // attention.kv_heads, attention.dim
    q, k, v = attention.query_key_value(x).split((heads * dim, heads * dim // groups, heads * dim // groups), -1)
    q, k, v = (n.unflatten(-1, (-1, dim)) for n in (q, k, v))
    if attention.qk_norm:
        q, k = attention.query_layernorm(q), attention.key_layernorm(k)
    q, k = (apply_rope(n, *call.tables.head) for n in (q, k))
    k, v = (n.repeat_interleave(groups, 2) for n in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / dim**0.5
    for t in range(x.shape[1]):
        for s in range(x.shape[1]):
            if s > t or (s != 0 and t - s >= near):
                scores[:, :, t, s] = -torch.inf
    return attention.dense(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))


@torch.no_grad()
def test_a_layer_that_reads_near_is_not_selected_however_badly_lightning_fits_it(monkeypatch):
    """Layer 1 reads the token before, alone: which no decaying sum of all tokens is, and which is near."""
    monkeypatch.setattr(select, "NEAR", 6)
    teacher = build(source(4, use_qkv_bias=True))
    looks_at_the_last_token(teacher.model.layers[1].attention)
    ids, target = [tokens(3), tokens(4)], target_config(teacher.config, group_size=4)
    near, kl = (
        select_layers(teacher, target, ids, Conversion(layer_score=score), seed=0, bf16=False).scores for score in ("near", "kl")
    )
    assert near[1] < 1e-3 * min(near[0], near[2], near[3])
    assert kl[1] > 1e-2


@torch.no_grad()
def test_local_scores_are_local_errors():
    """On a single batch, which is then the one of the fit too, against `layer_measures` of the first layer."""
    teacher, ids = build(source(4)), [tokens(6)]
    target = target_config(teacher.config, group_size=2)
    found = select_layers(teacher, target, ids, Conversion(layer_score="local"), seed=0, bf16=False)
    first = ("lightning", "gqa", "gqa", "gqa")
    half, _ = to_lightning(teacher, target.replace(layer_kinds=first), ids, OPTIONS, seed=0, **QUIET)
    assert found.scores[0] == pytest.approx(layer_measures(half, teacher, ids[0]).errors[0]["local"], rel=1e-6)


@pytest.mark.parametrize("score", ["near", "kl", "local"])
@torch.no_grad()
def test_layers_that_do_nothing_are_not_selected(score, monkeypatch):
    """For the final distribution a mixer of no output is free to go; its own relative error knows nothing of that."""
    monkeypatch.setattr(select, "NEAR", 6)
    teacher = build(source(4))
    for i in (1, 2):
        teacher.model.layers[i].attention.dense.weight.mul_(1e-6)
    target = target_config(teacher.config, group_size=2)
    found = select_layers(teacher, target, [tokens(3), tokens(4)], Conversion(layer_score=score), seed=0, bf16=False)
    least, most = max(found.scores[1], found.scores[2]), min(found.scores[0], found.scores[3])
    if score == "local":
        assert least > 0.1 * most
    else:
        assert found.layers == (0, 3)
        assert least < 1e-6 * most


@torch.no_grad()
def test_selection_from_a_folder(tmp_path):
    """One layer at a time, with the same scores; the score that needs the whole model says so."""
    teacher = build(source(4), dtype=torch.float32)
    save(teacher, tmp_path / "teacher")
    stack, ids = FolderStack(open_folder(tmp_path / "teacher"), torch.device("cpu")), [tokens(3), tokens(4)]
    target, local = target_config(teacher.config, group_size=2), Conversion(layer_score="local")
    whole = select_layers(teacher, target, ids, local, seed=0, bf16=False)
    assert select_layers(stack, target, ids, local, seed=0, bf16=False) == whole
    with pytest.raises(UserError, match="has to be in memory"):
        select_layers(stack, target, ids, OPTIONS, seed=0, bf16=False)


def mla_layers(out) -> list[int]:
    return [i for i, kind in enumerate(json.loads((out / "config.json").read_text())["layer_kinds"]) if kind == "mla"]


def test_named_layers_through_all_stages(place: Place, tmp_path, quick):
    """The finished folder states its layers, loads in transformers with the same logits, and says what stock engines lack."""
    out = tmp_path / "hybrid"
    result = place.migrate(out, "--layout", "0,2")
    assert result.code == 0, result.err
    assert mla_layers(out) == [0, 2]
    assert "layer_kinds" in (out / "launch_vllm.sh").read_text()
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, openling.load(out).model.float()(ids), atol=1e-4)


def test_a_pure_linear_model_takes_two_stages(place: Place, tmp_path, quick):
    result = place.migrate(tmp_path / "linear", "--layout", "none")
    assert result.code == 0, result.err
    assert mla_layers(tmp_path / "linear") == []
    assert "linear-warmup" in result.err
    assert "stage mla" not in result.err


def test_selected_layers_stay_softmax_and_are_reported(place: Place, tmp_path, quick):
    out = tmp_path / "half"
    words = ["--layout", "selected", "--stage", "lightning", "--group-size", "3"]
    result = place.migrate(out, *words, **{"text.sequence_length": 80})
    assert result.code == 0, result.err
    kinds = json.loads((out / "config.json").read_text())["layer_kinds"]
    report = json.loads((tmp_path / "half.run" / "report.json").read_text())
    rows = [a for a in report["stages"][1]["approximations"] if a["step"] == "layer selection"]
    best = max(rows, key=lambda a: a["value"])["layer"]
    assert [i for i, kind in enumerate(kinds) if kind == "gqa"] == [best]
    assert f"MLA in layers {best}" in result.err


def test_a_streamed_conversion_with_selected_layers(tmp_path, place: Place, monkeypatch):
    teacher, out = make_llama(tmp_path / "teacher", layers=4), tmp_path / "out"
    words = ["--layout", "selected", "--group-size", "2", "--text", place.calibration, "--text.sequence_length", "80"]
    words += ["--text.calibration_tokens", "2048"]
    for score in ("near", "kl"):  # what a dry run promises the run does
        for dry in ((), ("--dry-run",)):
            typed = ("--conversion.layer_score", score, *dry)
            refused(openling_command("convert", teacher, out, *words, *typed), "has to be in memory", "layer_score local")
    assert openling_command("convert", teacher, out, *words, "--dry-run").code == 0
    result = openling_command("convert", teacher, out, *words)
    assert result.code == 0, result.err
    assert len(mla_layers(out)) == 2
    typed = openling_command("convert", teacher, tmp_path / "typed", *words, "--conversion.layer_score", "local")
    assert typed.code == 0
    assert mla_layers(tmp_path / "typed") == mla_layers(out)
    for dry in ((), ("--dry-run",)):
        refused(openling_command("convert", teacher, tmp_path / "b", *words, "--weights-only", *dry), "--layout I,J")
    # What can be told before the walk is, and a finished or begun run needs none.
    monkeypatch.setattr(select, "walk", lambda *args, **kwargs: pytest.fail("it walks"))
    refused(openling_command("convert", teacher, out, *words), "exists already")
    assert openling_command("convert", teacher, out, *words, "--resume").code == 0
    begun = tmp_path / "out.run" / "job.json"
    job = json.loads(begun.read_text())
    job["settings"]["layout"]["mla_layers"] = "ling"
    begun.write_text(json.dumps(job))
    refused(openling_command("convert", teacher, out, *words, "--resume"), "settings have changed", "'mla_layers': 'ling'")


def test_a_streamed_selection_multiplies_as_the_fits_do(tmp_path, place: Place, monkeypatch):
    def walk(*args, bf16):
        raise UserError(f"in BF16: {bf16}")

    monkeypatch.setattr(select, "walk", walk)
    words = ["--layout", "selected", "--text", place.calibration]
    settle_bf16_matmuls(False)
    try:
        refused(openling_command("convert", place.teacher, tmp_path / "out", *words), "in BF16: False")
    finally:
        settle_bf16_matmuls(None)


def test_what_a_pure_linear_model_has_no_stage_for(place: Place, tmp_path):
    refused(place.migrate(tmp_path / "out", "--layout", "none", "--stage", "mla"), "pure linear", "another --layout")
    refused(place.migrate(tmp_path / "out", "--layout", "9"), "--layout", "rising numbers")
