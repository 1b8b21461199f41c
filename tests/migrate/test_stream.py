"""Conversion from folder to folder: the in-memory result to the bit, whatever is untouched byte for byte, FP8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_jobs import job, quantised, same, settings, teacher, tensors
from test_convert import windows
from transformers import AutoModelForCausalLM

import openling
from openling.errors import UserError
from openling.migrate.convert import to_lightning, to_mla
from openling.migrate.estimate import estimate
from openling.migrate.layout import lightning_stage, mla_stage
from openling.migrate.stream import convert_folder
from openling.migrate.touched import round_to
from openling.migrate.verify import verify
from openling.ops.cpu import half_products, settle_bf16_matmuls
from openling.weights.cluster import ENGINES, Launch, command, launch_script, read_checkpoint
from openling.weights.dcp import from_dcp, to_dcp
from openling.weights.export import save
from openling.weights.files import companions
from openling.weights.fp8 import Dequantised, Form, quantization_config
from openling.weights.headers import Span
from openling.weights.io import INDEX, CheckpointReader, TensorFiles
from openling.weights.linked import copy_folder

CPU = torch.device("cpu")
FAMILIES = ("LlamaForCausalLM", "MixtralForCausalLM", "BailingMoeV2ForCausalLM")
FORMS = {
    "block": Form("block", "_scale_inv", torch.float32, False, (8, 16)),
    "channel": Form("channel", "_scale", torch.bfloat16, False, (128, 128)),
}


def in_memory(source, out, config):
    """What the pipeline does: FP32 models, rounded between the stages."""
    loaded = openling.load(source)
    stored = loaded.model.lm_head.weight.dtype
    model, layout, quiet = (
        loaded.model.float(),
        config.layout.model_dump(),
        {"on_layer": lambda i: None, "bf16": half_products(CPU)},
    )
    if "lightning" in config.stages:
        half = lightning_stage(loaded.config, layout)
        model, _ = to_lightning(model, half, windows(), config.conversion, seed=config.seed, **quiet)
        round_to(model, stored)
    if "mla" in config.stages:
        model, _ = to_mla(model, mla_stage(model.config, layout), windows(), config.conversion, **quiet)
        round_to(model, stored)
    return save(model, out, dtype=stored, source=source)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_the_result_is_the_in_memory_one_to_the_bit(family, mode, tmp_path):
    source = teacher(tmp_path / "source", family)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    convert_folder(job(source, tmp_path / "out", mode=mode), resume=False)
    in_memory(source, tmp_path / "memory", settings())
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "memory")]
    assert config[0] == config[1]
    ids = windows()[0][:1]
    with torch.inference_mode():
        models = [openling.load(tmp_path / name, dtype=torch.float32).model for name in ("out", "memory")]
        assert torch.equal(models[0](ids), models[1](ids))
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


@pytest.mark.parametrize("mixed", [False, True])
def test_fp16_is_computed_as_the_in_memory_one_where_bf16_products_are_on(mixed, tmp_path, recwarn):
    source = teacher(tmp_path / "source", dtype=torch.float16)
    if mixed:
        shard = min(source.glob("*.safetensors"))
        save_file({n: t.bfloat16() for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    settle_bf16_matmuls(True)
    try:
        convert_folder(job(source, tmp_path / "out"), resume=False)
        in_memory(source, tmp_path / "memory", settings())
    finally:
        settle_bf16_matmuls(None)
    a, b = (openling.load(tmp_path / name, dtype=torch.float32).model.state_dict() for name in ("out", "memory"))
    same({n: t.half() for n, t in a.items()}, {n: t.half() for n, t in b.items()})
    recwarn.clear()
    assert {check.outcome for check in verify(source, tmp_path / "out")} == {"ok"}
    assert not recwarn.list  # it rounds nothing that it compares


def test_one_stage_at_a_time_is_both_at_once(tmp_path):
    source = teacher(tmp_path / "source", dtype=torch.float32)
    convert_folder(job(source, tmp_path / "half", mode="link", config=settings(stages=("lightning",))), resume=False)
    convert_folder(job(tmp_path / "half", tmp_path / "hybrid", mode="link", config=settings(stages=("mla",))), resume=False)
    convert_folder(job(source, tmp_path / "both"), resume=False)
    same(tensors(tmp_path / "hybrid"), tensors(tmp_path / "both"))


def test_links_share_bytes_and_name_what_is_stale(tmp_path):
    source = teacher(tmp_path / "source")
    report = convert_folder(job(source, tmp_path / "out", mode="link"), resume=False)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    linked = [p for p in (tmp_path / "out").glob("*.safetensors") if p.stat().st_nlink == 2]
    assert linked and report["bytes linked"] == sum(p.stat().st_size for p in linked)
    for path in linked:
        assert path.samefile(source / path.name)
    stale = set(index["metadata"]["stale_in"])
    assert stale and stale <= {p.name for p in linked}
    # A shard is linked unless most of it was attention; those are few and small here.
    assert report["bytes copied"] < report["bytes linked"]


@pytest.mark.parametrize("mode", ["copy", "link"])
@pytest.mark.parametrize("name", ["model-layer-00001.safetensors", "model-kept-00001.safetensors", "modeling_openling.py"])
def test_a_shard_that_is_called_like_a_file_of_the_result(mode, name, tmp_path):
    source = teacher(tmp_path / "source")
    convert_folder(job(source, tmp_path / "usual", mode=mode, text=False), resume=False)
    shard = min(p.name for p in source.glob("*.safetensors"))
    (source / shard).rename(source / name)
    (source / INDEX).write_text((source / INDEX).read_text().replace(shard, name))
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    convert_folder(job(source, tmp_path / "out", mode=mode, text=False), resume=False)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    same(tensors(tmp_path / "out"), tensors(tmp_path / "usual"))


def test_weights_alone_need_neither_text_nor_the_experts(tmp_path, monkeypatch):
    source = teacher(tmp_path / "source")
    read = []
    original = CheckpointReader.read_rows
    monkeypatch.setattr(CheckpointReader, "read_rows", lambda s, n, a, b: read.append(n) or original(s, n, a, b))
    for name in ("out", "again"):
        convert_folder(job(source, tmp_path / name, mode="link", text=False), resume=False)
    assert read and all("attention" in n or "input_layernorm" in n for n in read)
    same(tensors(tmp_path / "out"), tensors(tmp_path / "again"))
    logits = openling.load(tmp_path / "out", dtype=torch.float32).model(windows()[0][:1])
    assert logits.isfinite().all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_fp8_in_and_out(form, tmp_path):
    """What is untouched keeps bytes and scales; what is new was fitted on FP32 values and quantised in the same form."""
    source = quantised(teacher(tmp_path / "plain"), tmp_path / "source", form)
    convert_folder(job(source, tmp_path / "out"), resume=False)
    old, new = tensors(source), tensors(tmp_path / "out")
    untouched = [name for name in new if ".attention." not in name]
    assert any(name.endswith(form.suffix) for name in untouched)
    same({n: new[n] for n in untouched}, {n: old[n] for n in untouched})
    loaded = openling.load(source, dtype=torch.float32)
    layout, quiet = settings().layout.model_dump(), {"on_layer": lambda i: None, "bf16": half_products(CPU)}
    half, _ = to_lightning(
        loaded.model, lightning_stage(loaded.config, layout), windows(), settings().conversion, seed=0, **quiet
    )
    state, fitted = half.state_dict(), [n for n in new if ".layers.0.attention." in n and not n.endswith(form.suffix)]
    assert len(fitted) == 6
    for name in fitted:
        if state[name].dim() == 2:
            values, scale = form.quantise(state[name])
            assert torch.equal(new[name].view(torch.uint8), values.view(torch.uint8)), name
            assert torch.equal(new[name + form.suffix], scale)
        else:
            assert torch.equal(new[name], state[name].bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fp8", "weight_block_size": list(form.block)}
    assert {c.outcome for c in verify(source, tmp_path / "out") if "heads" not in c.name} == {"ok"}
    assert openling.load(tmp_path / "out", dtype=torch.float32).model(windows()[0][:1]).isfinite().all()


@pytest.mark.parametrize(
    "listed", [None, ["lm_head", "model.norm", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn"]]
)
def test_fp8_settings_name_what_the_new_folder_stores_otherwise(listed, tmp_path):
    """Attention was BF16, and so are the new mixers, under other names."""
    about = {} if listed is None else {"modules_to_not_convert": listed}
    plain = teacher(tmp_path / "plain", "LlamaForCausalLM")
    source = quantised(plain, tmp_path / "source", FORMS["block"], "self_attn", **about)
    convert_folder(job(source, tmp_path / "out", text=False), resume=False)
    new = tensors(tmp_path / "out")
    linear = {
        n.removesuffix(".weight") for n in new if n.endswith("weight") and new[n].dim() == 2 and n + "_scale_inv" not in new
    }
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.attention.g_proj" in linear
    assert set(found) == linear - {"model.word_embeddings"} | ({"model.norm"} if listed else set())
    assert len(found) == len(set(found))


def test_fp8_settings_stay_where_nothing_new_is_stored_otherwise():
    def spans(dtypes: dict[str, str]) -> dict[str, Span]:
        return {name + ".weight": Span("shard", dtype, (8, 8), 0, 64) for name, dtype in dtypes.items()}

    source = TensorFiles(Path(), spans({"mlp.gate": "BF16", "mlp.up_proj": "F8_E4M3"}))
    kept = {"mlp.gate": "BF16", "mlp.up_proj": "F8_E4M3", "lm_head": "BF16"}
    assert quantization_config({"fmt": "e4m3"}, spans(kept), source) == {"fmt": "e4m3"}
    # All experts of a layer are one entry, where none is FP8.
    for first, module in {"BF16": "mlp.experts", "F8_E4M3": "mlp.experts.1.up_proj"}.items():
        experts = spans({"mlp.experts.0.up_proj": first, "mlp.experts.1.up_proj": "BF16"})
        assert quantization_config({}, experts, source) == {"modules_to_not_convert": [module]}


def test_fp8_in_the_published_blocks_loads_in_transformers(tmp_path):
    """Scales of 128 x 128 in FP32, as DeepSeek and Ling have them: on a CPU transformers makes BF16 of them, as we do."""
    plain = teacher(tmp_path / "plain")
    source = quantised(plain, tmp_path / "source", Form("block", "_scale_inv", torch.float32, False, (128, 128)))
    convert_folder(job(source, tmp_path / "out"), resume=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ours, ids = openling.load(tmp_path / "out", dtype=torch.bfloat16).model, windows()[0][:1]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(16, 32), (13, 33), (1, 5)])
def test_fp8_rounding(form, shape):
    """The error of e4m3 is at most 2^-4 of a value, or half the smallest step where it is tiny beside its block's largest."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scale = form.quantise(weight)
    assert scale.shape == form.scale_shape(shape)
    wide = form.widen(scale, shape).expand(shape)
    # A BF16 scale may be too small by 2^-8: the largest value is then cut off to 448.
    bound = torch.maximum(weight.abs() * (2**-4 + 2**-8), wide * 2**-10)
    assert ((values.float() * wide - weight).abs() <= bound).all()
    again, scale_again = form.quantise(values.float() * wide)
    if form.scale_dtype == torch.float32:
        assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
        assert torch.allclose(scale_again, scale, rtol=1e-6)


@pytest.mark.parametrize("gain", [1e-30, 0.02, 1.1, 1.5, 448.0])
@pytest.mark.parametrize("kind", ["block", "channel"])
def test_fp8_with_scales_that_are_powers_of_two_cuts_nothing_off(kind, gain):
    """e4m3 has three bits behind the point: the error is at most 2^-4 of a value, or half the smallest step, 2^-9 of a scale."""
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)) * gain
    weight[39] = 0
    form = Form(kind, "_scale_inv" if kind == "block" else "_scale", torch.float8_e8m0fnu, False, (16, 16))
    values, scale = form.quantise(weight)
    wide = form.widen(scale, (40, 48)).expand(40, 48)
    bound = torch.maximum(weight.abs() * 2**-4, wide * 2**-10)
    assert ((values.float() * wide - weight).abs() <= bound).all()
    largest = values.float().abs().amax(1)[:39] if kind == "channel" else values.float().abs().amax()
    assert (largest >= 224).all()  # half of 448: the scale is not one power too large, either


def test_dequantised_rows_are_rows_of_the_whole(tmp_path):
    source = quantised(teacher(tmp_path / "plain"), tmp_path / "source", FORMS["block"])
    raw = CheckpointReader(source)
    reader = Dequantised(raw, json.loads((source / "config.json").read_text()))
    name = next(iter(reader.forms))
    assert torch.equal(reader.read_rows(name, 3, 2), reader.read(name)[3:5])
    assert not [n for n in reader.names() if n.endswith("_scale_inv")]


def test_a_clean_copy_of_a_linked_folder(tmp_path):
    source = teacher(tmp_path / "source")
    convert_folder(job(source, tmp_path / "out", mode="link", text=False), resume=False)
    copy_folder(tmp_path / "out", tmp_path / "clean")
    same(tensors(tmp_path / "clean"), tensors(tmp_path / "out"))
    assert "stale_in" not in json.loads((tmp_path / "clean" / INDEX).read_text())["metadata"]
    for engine in ENGINES:  # which load whole shards
        with pytest.raises(UserError, match="linked folder"):
            command(engine, read_checkpoint(tmp_path / "out"), "MODEL", Launch(tp=1))
        script = f"launch_{engine}.sh"
        assert "--to hf" in (tmp_path / "out" / script).read_text()
        assert (tmp_path / "clean" / script).read_text() == launch_script(engine, read_checkpoint(tmp_path / "clean"))
    assert all(p.stat().st_nlink == 1 for p in (tmp_path / "clean").iterdir())
    for name in ("openling.json", "README.md"):
        assert "stale" in (tmp_path / "out" / name).read_text()
        assert "stale" not in (tmp_path / "clean" / name).read_text()
    record = json.loads((tmp_path / "out" / "openling.json").read_text())
    assert json.loads((tmp_path / "clean" / "openling.json").read_text()) == {k: record[k] for k in record if k != "note"}
    from_dcp(to_dcp(tmp_path / "out", tmp_path / "dcp"), tmp_path / "back")
    for path in companions(tmp_path / "clean"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_dry_run_says_what_then_happens(mode, tmp_path):
    source = teacher(tmp_path / "source")
    said = estimate(source, settings(), mode, beside=tmp_path, batches=None)
    report = convert_folder(job(source, tmp_path / "out", mode=mode, text=False), resume=False)
    assert said.linked == report["bytes linked"]
    headers = sum(int.from_bytes(p.read_bytes()[:8], "little") + 8 for p in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= report["bytes of new layers"] - said.written <= headers
    assert 0 <= report["bytes copied"] - said.copied <= headers
    assert said.read_for_fits == report["bytes of old attention"] < CheckpointReader(source).total_bytes
    assert sum(row.bytes for row in said.rows) == CheckpointReader(source).total_bytes
    assert {row.becomes for row in said.rows if row.name == "attention"} == {"lightning", "mla"}
    assert {row.becomes for row in said.rows if row.name != "attention"} == {"kept"}
