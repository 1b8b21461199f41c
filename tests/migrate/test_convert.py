"""Both conversions on tiny random teachers of every family's shape: what is shared, what is reported, `best` against `paper`."""

import pytest
import torch
import torch.nn.functional as F

from openling.config.migrate import Conversion, preset
from openling.errors import UserError
from openling.migrate.calibrate import walk
from openling.migrate.convert import Approximation, derive, to_lightning, to_mla
from openling.migrate.layout import stage_kinds, target_config
from openling.migrate.measure import layer_measures
from openling.migrate.qknorm import remove_norms
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import GroupedQueryAttention, LatentAttention, LightningAttention, Ling

VOCAB, LAYERS, T = 50, 4, 48
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LING_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Qwen3MoeForCausalLM": {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "BailingMoeV2ForCausalLM": {"partial_rotary_factor": 0.5, "head_dim": 8, "num_nextn_predict_layers": 1, **LING_MOE},
}
BEST, PAPER = preset("best").conversion, preset("paper").conversion
PRESETS = {"best": BEST, "paper": PAPER}


def teacher_config(family: str) -> ModelConfig:
    return read_config({"architectures": [family], **BASE, **FAMILIES[family]})


@torch.no_grad()
def build(c: ModelConfig, seed=0) -> Ling:
    """Random everywhere, biases and norms too; attention sharp enough to matter."""
    g = torch.Generator().manual_seed(seed)
    model = Ling(c)
    for name, x in model.state_dict().items():
        if c.tie_word_embeddings and name == "lm_head.weight":
            continue
        noise = torch.randn(x.shape, generator=g)
        wide = noise if "embeddings" in name else noise * (1.5 / x.shape[-1] ** 0.5)
        x.copy_(wide if x.dim() >= 2 else 0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def windows(seed=0):
    """Two batches of skewed token ids: the embeddings of real text are not white either."""
    g = torch.Generator().manual_seed(seed)
    ids = (VOCAB * torch.rand(10, T, generator=g) ** 3).long()
    return [ids[:6], ids[6:]]


def layouts(source: ModelConfig, **options) -> tuple[ModelConfig, ModelConfig]:
    """The configurations after each conversion, groups of two, with ranks that really cut."""
    target = target_config(source, **{"group_size": 2, "kv_lora_rank": 16, "q_lora_rank": 24} | options)
    kinds = stage_kinds(source, target, "lightning")
    return target.replace(layer_kinds=kinds, mtp_layer_kind=source.mtp_layer_kind), target


def convert(teacher, options, batches=None, *, bf16=False, seed=0, **layout):
    """Both conversions; (half-way model, hybrid, approximations, layers announced)."""
    half, full = layouts(teacher.config, **layout)
    batches = windows() if batches is None else batches
    seen: list[int] = []
    first, found = to_lightning(teacher, half, batches, options, seed=seed, on_layer=seen.append, bf16=bf16)
    second, more = to_mla(first, full, batches, options, on_layer=seen.append, bf16=bf16)
    return first, second, found.approximations + more.approximations, seen


def snapshot(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def is_of(name: str, layers) -> bool:
    return any(name.startswith(f"model.layers.{i}.attention.") for i in layers)


@pytest.mark.parametrize("options", [BEST, PAPER], ids=["best", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_converts(family, options):
    """Kinds as planned, finite logits, unchanged tensors shared, the sources' bits untouched, every layer announced."""
    teacher = build(teacher_config(family))
    before = snapshot(teacher)
    half, hybrid, found, seen = convert(teacher, options)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    layers = len(teacher.model.layers)
    assert seen == [*range(layers), *range(layers)]
    kinds = [type(layer.attention) for layer in hybrid.model.layers]
    assert kinds == [LightningAttention, LatentAttention] * 2 + [LatentAttention] * (layers - LAYERS)
    assert [type(layer.attention) for layer in half.model.layers[:LAYERS]] == [LightningAttention, GroupedQueryAttention] * 2
    for old, new, changed in ((teacher, half, (0, 2)), (half, hybrid, (1, 3, 4))):
        own = old.state_dict()
        for name, x in new.state_dict().items():
            if is_of(name, changed):
                assert torch.isfinite(x).all(), name
            else:
                assert x.data_ptr() == own[name].data_ptr(), name
    ids = windows(3)[0]
    for model in (half, hybrid):
        logits = model(ids)
        assert torch.isfinite(logits).all()
        assert (logits - teacher(ids)).abs().max() > 1e-3  # the conversion is an approximation here
    assert all(0 <= a.value < 10 and a.layer < layers for a in found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_best_has_less_local_error_than_paper_on_the_same_windows(family):
    """Each conversion against the model it started from, on the windows of the fit; both MLA ones from the same half-way model.

    The first layer of a kind is fitted to the very inputs that `local` reads. Later ones are fitted to correct what reaches them,
    which `propagated` reads; on the source's own stream they may do worse.
    """
    teacher, ids = build(teacher_config(family)), torch.cat(windows())
    half_config, full = layouts(teacher.config)
    quiet = {"on_layer": lambda i: None, "bf16": False}
    half = {name: to_lightning(teacher, half_config, windows(), o, seed=0, **quiet)[0] for name, o in PRESETS.items()}
    whole = {name: to_mla(half["best"], full, windows(), o, **quiet)[0] for name, o in PRESETS.items()}
    for kind, source, made in (("lightning", teacher, half), ("mla", half["best"], whole)):
        rows = {name: [r for r in layer_measures(model, source, ids).errors if r["kind"] == kind] for name, model in made.items()}
        assert len(rows["best"]) == len(rows["paper"]) >= 2
        assert rows["best"][0]["local"] < rows["paper"][0]["local"], kind
        assert all(b["propagated"] < p["propagated"] for b, p in zip(rows["best"], rows["paper"], strict=True)), (kind, rows)


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Qwen2ForCausalLM"])
@torch.no_grad()
def test_each_closed_form_step_helps_the_mla_layers(family):
    """Changes of `best` from one half-way model, by the sum of local errors over the MLA layers."""
    teacher, ids = build(teacher_config(family)), torch.cat(windows())
    half_config, full = layouts(teacher.config)
    quiet = {"on_layer": lambda i: None, "bf16": False}
    half, _ = to_lightning(teacher, half_config, windows(), BEST, seed=0, **quiet)

    def error(**changes) -> float:
        hybrid, _ = to_mla(half, full, windows(), Conversion(**{**BEST.model_dump(), **changes}), **quiet)
        return sum(row["local"] for row in layer_measures(hybrid, half, ids).errors if row["kind"] == "mla")

    base = error()
    changes = {"refit_output": False, "latent_norm": "inverse", "attention_weighted": False}
    for name, value in [*changes.items(), ("latent_norm", "rms")]:
        assert error(**{name: value}) > base, (name, value)


@torch.no_grad()
def test_the_reported_refit_error_is_the_local_error_of_the_first_layer():
    """Layer 0 sees the teacher's own stream, so that `measure` must find the number that the conversion reported."""
    teacher = build(teacher_config("LlamaForCausalLM"))
    half, _, found, _ = convert(teacher, BEST)
    (reported,) = [a.value for a in found if a.layer == 0 and a.step == "softmax attention replaced by Lightning"]
    measured = layer_measures(half, teacher, torch.cat(windows())).errors[0]["local"]
    assert reported == pytest.approx(measured, rel=1e-4)
    assert 0 < reported < 1


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "BailingMoeV2ForCausalLM"])
@torch.no_grad()
def test_a_layer_without_biases_is_fitted_without_them(family):
    """Its queries after QK-norm removal are the ridge solution on the inputs alone: an intercept would have nowhere to go."""
    teacher = build(teacher_config(family))
    half, _ = layouts(teacher.config)
    full = layouts(teacher.config)[1].replace(q_lora_rank=None)
    quiet = {"on_layer": lambda i: None, "bf16": False}
    source, _ = to_lightning(teacher, half, windows(), BEST, seed=0, **quiet)
    inputs = [
        x.flatten(0, 1).double() for step in walk(source, source, windows(), bf16=False) if step.index == 1 for x in step.inputs()
    ]
    assert torch.cat(inputs).mean(0).norm() > 0.1 * torch.cat(inputs).norm(dim=1).mean()  # far enough from centred to tell
    hybrid, _ = to_mla(source, full, windows(), Conversion(**{**BEST.model_dump(), "qk_norm_removal": "ridge"}), **quiet)
    old, new = (m.model.layers[1].attention for m in (source, hybrid))
    rows = old.query_key_value.weight.double().unflatten(0, (-1, old.dim))[: old.heads]
    padded = [F.pad(x, (0, 1)) for x in inputs]  # a bias input of zero; it takes part in the mean that damping is relative to
    norm = old.query_layernorm
    gamma = norm.weight.double().expand(len(rows), -1)
    (expected,) = (r.weight for r in remove_norms(F.pad(rows, (0, 1)), gamma, norm.eps, padded, "ridge", [len(rows)]))
    found = new.q_proj.weight.double().unflatten(0, (old.heads, -1))[:, : old.dim] * new.scale * old.dim**0.5
    assert not expected[..., -1].any()
    assert (found - expected[..., :-1]).abs().max() < 1e-6 * expected.abs().max()  # written in FP32


@torch.no_grad()
def test_what_is_reported_by_name():
    teacher = build(teacher_config("BailingMoeV2ForCausalLM"))
    _, _, found, _ = convert(teacher, BEST)
    by_layer: dict[int, list[str]] = {}
    for a in found:
        assert isinstance(a, Approximation)
        by_layer.setdefault(a.layer, []).append(a.step)
    lightning, mla = (
        ["softmax attention replaced by Lightning"],
        ["QK-norm removal"] * 2 + ["MLA factors"] * 3 + ["GQA replaced by MLA"],
    )
    mla_steps = {layer: [s for s in steps if s != "RoPE folding"] for layer, steps in by_layer.items()}
    assert all(("RoPE folding" in steps) == (layer in (1, 3, LAYERS)) for layer, steps in by_layer.items())
    assert mla_steps == {0: lightning, 2: lightning, 1: mla, 3: mla, LAYERS: mla}
    assert {a.measure for a in found if a.step == "MLA factors"} == {"rope energy kept", "kv energy kept", "query energy kept"}
    assert all(a.value <= 1 + 1e-9 for a in found if a.step == "MLA factors")
    _, _, plain, _ = convert(teacher, PAPER)
    assert {a.step for a in plain} == {"QK-norm removal", "MLA factors"}  # the paper's preset fits no output projection
    assert all("pooled" in a.measure for a in plain if a.step == "QK-norm removal")


@torch.no_grad()
def test_mtp_layer_becomes_mla_and_still_predicts():
    """It never becomes Lightning; joint, norms and experts are the teacher's own."""
    teacher = build(teacher_config("BailingMoeV2ForCausalLM"))
    half, hybrid, _, _ = convert(teacher, BEST)
    assert isinstance(half.model.layers[LAYERS].attention, GroupedQueryAttention)
    (layer,) = hybrid.model.mtp_layers()
    assert isinstance(layer.attention, LatentAttention)
    ids, kept = windows(5)[0], {}
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        states = []
        model(ids, hidden_states=states)
        (kept[name],) = model.mtp_logits(ids, states[-1])
        assert torch.isfinite(kept[name]).all()
    # The converted attention read the MTP layer's own inputs: on these its output is closer to the teacher's than zero is.
    (row,) = [row for row in layer_measures(hybrid, teacher, torch.cat(windows())).errors if row["layer"] == LAYERS]
    assert row["local"] < 0.5
    assert layer.eh_proj.weight.data_ptr() == teacher.model.layers[LAYERS].eh_proj.weight.data_ptr()


@torch.no_grad()
def test_random_heads_depend_on_the_seed_alone():
    teacher = build(teacher_config("LlamaForCausalLM"))
    a, b, c = (convert(teacher, PAPER, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.attention.query_key_value.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


@pytest.mark.parametrize("rope", [8, 4, 2])
@torch.no_grad()
def test_folded_rope(rope):
    """qk_rope_head_dim below the teacher's rotated dims: narrower shared keys, more energy lost."""
    teacher = build(teacher_config("Qwen2ForCausalLM"))
    _, hybrid, found, _ = convert(teacher, BEST, qk_rope_head_dim=rope)
    assert hybrid.model.layers[1].attention.kv_a_proj_with_mqa.weight.shape == (16 + rope, 32)
    assert torch.isfinite(hybrid(windows()[0])).all()
    kept = [a.value for a in found if a.measure == "rope energy kept"]
    assert len(kept) == 2
    if rope < 8:
        _, _, wider, _ = convert(teacher, BEST, qk_rope_head_dim=2 * rope)
        assert all(x <= y for x, y in zip(kept, [a.value for a in wider if a.measure == "rope energy kept"], strict=True))


@torch.no_grad()
def test_full_ranks_without_a_low_rank_query():
    teacher = build(teacher_config("LlamaForCausalLM"))
    half, full = layouts(teacher.config, kv_lora_rank=32)
    full = full.replace(q_lora_rank=None)
    first, _ = to_lightning(teacher, half, windows(), BEST, seed=0, on_layer=lambda i: None, bf16=False)
    hybrid, found = to_mla(first, full, windows(), BEST, on_layer=lambda i: None, bf16=False)
    assert [a.value for a in found.approximations if a.measure == "kv energy kept"] == pytest.approx([1.0, 1.0])
    assert not hasattr(hybrid.model.layers[1].attention, "q_a_proj")
    assert torch.isfinite(hybrid(windows()[0])).all()


@torch.no_grad()
def test_bf16_passes_change_little():
    teacher, ids = build(teacher_config("Qwen3ForCausalLM")), torch.cat(windows())
    errors = []
    for bf16 in (False, True):
        half, _, _, _ = convert(teacher, BEST, bf16=bf16)
        errors.append(sum(row["local"] for row in layer_measures(half, teacher, ids).errors if row["kind"] == "lightning"))
        assert all(p.dtype == torch.float32 for p in half.parameters())
    assert errors[1] == pytest.approx(errors[0], rel=0.05)  # BF16 activations carry 0.4 % noise each


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@torch.no_grad()
def test_mla_that_bf16_passes_fit_is_as_near(family):
    """Of one half-way model. The root of a relative error is a distance over the target's length: it moves by no more than the
    outputs do, of which BF16 rounds some ten in each of four layers, by 2^-9 at most, 2^-9 / sqrt(3) in the root mean square.
    Families without routers: one that chooses another expert moves by more."""
    teacher, ids = build(teacher_config(family)), torch.cat(windows())
    half, _, _, _ = convert(teacher, BEST)
    _, full = layouts(teacher.config)
    roots = []
    for bf16 in (False, True):
        hybrid, _ = to_mla(half, full, windows(), BEST, on_layer=lambda i: None, bf16=bf16)
        assert all(p.dtype == torch.float32 for p in hybrid.parameters())
        errors = layer_measures(hybrid, half, ids).errors
        roots.append([row["local"] ** 0.5 for row in errors if row["kind"] == "mla"])
    assert roots[1] != roots[0]
    assert roots[1] == pytest.approx(roots[0], abs=2**-9 * (40 / 3) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Derived models and the walk
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_derive_unties_embeddings_without_copying():
    teacher = build(teacher_config("LlamaForCausalLM"))
    half, _ = layouts(teacher.config)
    student = derive(teacher, half)
    assert not student.config.tie_word_embeddings
    assert student.lm_head.weight is not student.model.word_embeddings.weight
    assert student.lm_head.weight.data_ptr() == teacher.lm_head.weight.data_ptr()
    assert not student.training
    new = student.model.layers[0].attention
    assert not new.query_key_value.weight.any()
    assert torch.equal(new.g_norm.weight, torch.ones_like(new.g_norm.weight))


@torch.no_grad()
def test_the_walk_follows_the_models_own_passes():
    """Residual streams equal the hidden states of a forward pass, MTP layers included."""
    c = teacher_config("BailingMoeV2ForCausalLM").replace(num_nextn_predict_layers=2)
    teacher = build(c)
    student = build(layouts(c)[1], seed=1)
    batches = windows()
    expected = {}
    for name, model in (("teacher", teacher), ("student", student)):
        expected[name] = []
        for w in batches:
            states: list[torch.Tensor] = []
            model(w, hidden_states=states)
            expected[name].append((states, model.mtp_logits(w, states[-1])))
    indices = []
    for step in walk(teacher, student, batches, bf16=False):
        indices.append(step.index)
        for name, streams, model in (("teacher", step.teacher_h, teacher), ("student", step.student_h, student)):
            for b, h in enumerate(streams):
                states, mtp = expected[name][b]
                if step.index < LAYERS:
                    assert torch.equal(h, states[step.index])
                else:
                    layer = model.model.layers[step.index]
                    call = step.teacher_call if name == "teacher" else step.student_call
                    out = h + layer.attention(layer.input_layernorm(h), call)
                    out = layer.final_layernorm(out + layer.mlp(layer.post_attention_layernorm(out)))
                    assert torch.allclose(model.logits(out), mtp[step.index - LAYERS], rtol=0, atol=1e-5)
    assert indices == list(range(LAYERS + 2))


@torch.no_grad()
def test_a_changed_layer_is_seen_by_the_next_one():
    c = teacher_config("LlamaForCausalLM")
    teacher = build(c)
    student = derive(teacher, layouts(c)[0])
    gaps = []
    for step in walk(teacher, student, windows(), bf16=False):
        gaps.append(max(float((t - s).abs().max()) for t, s in zip(step.teacher_h, step.student_h, strict=True)))
        if step.index == 1:
            step.student.attention = GroupedQueryAttention(c, 1)
    assert gaps[0] == 0  # the same embeddings
    assert min(gaps[1:]) > 1e-3  # layer 0's mixer is still empty
    assert student.model.layers[1].attention is not teacher.model.layers[1].attention


# ---------------------------------------------------------------------------------------------------------------------
# Layouts that cannot be filled, devices
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"qk_rope_head_dim": 6}, {"qk_rope_head_dim": 16}, {"kv_lora_rank": 33}, {"q_lora_rank": 65}, {"kv_lora_rank": 0}]
)
def test_widths_that_the_conversion_cannot_fill_are_refused(options):
    """8 rotated dims fold into 8, 4 or 2; K and V have 32 rows, the queries 4 x (8 + 8)."""
    with pytest.raises(UserError) as caught:
        target_config(teacher_config("LlamaForCausalLM"), group_size=2, **options)
    ((where, value),) = options.items()
    assert (caught.value.parts["where"], caught.value.parts["value"]) == (f"--layout.{where}", value)


@torch.no_grad()
def test_default_ranks_fit_the_smallest_models():
    """One K/V head of 8 dims has 16 rows of K and V in all: less than the least default rank of 32."""
    c = teacher_config("LlamaForCausalLM").replace(num_key_value_heads=1, num_attention_heads=2)
    target = target_config(c, group_size=2)
    assert (target.kv_lora_rank, target.q_lora_rank) == (16, 32)
    hybrid = convert(build(c), BEST, kv_lora_rank=None, q_lora_rank=None)[1]
    assert torch.isfinite(hybrid(windows()[0])).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [BEST, PAPER], ids=["best", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cuda_equals_cpu(family, options):
    """FP32 on both, tensor cores off; eigenvectors may differ in sign, errors per layer do not."""
    teacher, ids = build(teacher_config(family)), torch.cat(windows())
    on_cpu = [layer_measures(m, teacher, ids).errors for m in convert(teacher, options)[:2]]
    other = build(teacher_config(family)).cuda()
    on_cuda = [layer_measures(m, other, ids).errors for m in convert(other, options, [w.cuda() for w in windows()])[:2]]
    for a, b in zip(on_cpu, on_cuda, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y["local"] == pytest.approx(x["local"], rel=2e-2, abs=1e-6)
