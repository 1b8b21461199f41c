"""What can be wrong with a folder, on either side: every mistake is a `UserError` that says what, where and what to do."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import write_tokenizer
from tiny_models import GOLDEN, HYBRID, tiny
from torch import Tensor

import openling
from openling.errors import Failure, UserError
from openling.model.ling import Ling
from openling.weights.export import save
from openling.weights.folder import load_tokenizer
from openling.weights.io import INDEX, SINGLE, CheckpointReader, FolderWriter

SHARD = 40_000
QKV = "model.layers.0.attention.query_key_value.weight"


@pytest.fixture(scope="module")
def model() -> Ling:
    return tiny(HYBRID)


@pytest.fixture
def folder(model: Ling, tmp_path: Path) -> Path:
    return save(model, tmp_path / "model", shard_bytes=SHARD)


@pytest.fixture
def single(model: Ling, tmp_path: Path) -> Path:
    return save(model, tmp_path / "model")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def refused(folder: str | Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        openling.load(folder)
    for word in words:
        assert word in str(error.value), str(error.value)


# What a folder holds


def test_reader_knows_shapes_and_bytes_without_reading(folder: Path) -> None:
    reader = CheckpointReader(folder)
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    assert set(reader.names()) == set(tensors)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    for name, tensor in tensors.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert reader.total_bytes == total
    assert json.loads((folder / INDEX).read_text())["metadata"] == {"total_size": total}


@torch.no_grad()
def test_promised_mtp_may_be_absent(single: Path, model: Ling) -> None:
    edit_tensors(single, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.4.")])
    with pytest.warns(UserWarning, match="without MTP"):
        loaded = openling.load(single)
    assert loaded.config.num_nextn_predict_layers == 0
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.model(ids), model(ids))


def test_other_spelling_of_the_router_bias(single: Path, model: Ling) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("expert_bias")]:
            tensors[name.replace("expert_bias", "e_score_correction_bias")] = tensors.pop(name).bfloat16()

    edit_tensors(single, rename)
    bias = openling.load(single).model.state_dict()["model.layers.2.mlp.gate.expert_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, model.state_dict()["model.layers.2.mlp.gate.expert_bias"].bfloat16().float())


def test_mixed_dtypes_load_as_the_commonest(single: Path) -> None:
    edit_tensors(single, lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k != "lm_head.weight" and v.dim() > 1}))
    with pytest.warns(UserWarning, match="float32 tensors are rounded"):
        loaded = openling.load(single)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in openling.load(single, dtype=torch.float32).model.parameters()} == {torch.float32}


def test_recomputed_tensors_are_ignored(single: Path) -> None:
    edit_tensors(single, lambda t: t.update({"model.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}))
    openling.load(single)


def test_import_stays_light() -> None:
    code = "import sys, openling; assert openling.__version__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Wrong folders


def test_no_folder(folder: Path) -> None:
    refused(folder.parent / "modell", "no such folder", f"nearest:  {folder}")
    refused("someone/some-model", "no such folder", "not downloaded")
    refused(folder / "config.json", "a folder, not a file")


def test_config_missing_or_broken(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text("{'a': 1}")
    refused(folder, "not valid JSON", str(config))
    config.write_text("[]")
    refused(folder, "not a JSON object")
    config.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "Git LFS pointer", "git lfs pull")
    config.unlink()
    refused(folder, "config.json is missing")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("hidden_size", "abc", ["wrong kind", "hidden_size", "'abc'", "an integer"]),
        ("num_hidden_layers", 2.0, ["wrong kind", "num_hidden_layers", "2.0", "an integer"]),
        ("vocab_size", True, ["wrong kind", "vocab_size", "True", "an integer"]),
        ("tie_word_embeddings", "no", ["wrong kind", "tie_word_embeddings", "'no'", "true or false"]),
        ("num_key_value_heads", 0, ["num_key_value_heads", "a positive integer"]),
        ("architectures", 5, ["unknown architecture", "5"]),
        ("architectures", [5], ["unknown architecture", "5"]),
        ("rms_norm_eps", "small", ["wrong kind", "rms_norm_eps", "'small'", "a number"]),
        ("num_hidden_layers", 10**22, ["so many layers", "num_hidden_layers", "10000 at most"]),
        ("num_nextn_predict_layers", 10**6, ["so many layers", "num_nextn_predict_layers"]),
    ],
)
def test_a_number_of_another_kind(folder: Path, key: str, value: object, told: list[str]) -> None:
    edit_config(folder, **{key: value})
    refused(folder, *told)


def test_null_is_as_if_the_key_were_not_there(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=None, rope_theta=None)
    assert openling.load(folder).config.rms_norm_eps == 1e-6


def test_an_index_of_other_things_than_names(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": 5}}')
    refused(folder, "the index lists no tensors", "shard")


def test_unknown_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForCausalM"])
    refused(folder, "unknown architecture", "nearest:  LlamaForCausalLM")


def test_no_safetensors(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refused(single, "no safetensors", "pytorch_model.bin", "save_pretrained")
    (single / "pytorch_model.bin").rename(single / "model.gguf")
    refused(single, "no safetensors", "import_gguf")
    (single / "model.gguf").unlink()
    refused(single, "no safetensors")


def test_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    refused(folder, "shard is missing", shard.name)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_shard(single: Path, keep: int) -> None:
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:keep])
    refused(single, "damaged or truncated", SINGLE)


def test_corrupt_header_and_pointer(single: Path) -> None:
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    refused(single, "damaged or truncated")
    (single / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(single, "Git LFS pointer")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        *({"dtype": dtype} for dtype in (None, ["F32"], 5)),
        *(
            {"shape": json.loads(s)}
            for s in ("null", "5", "[Infinity, 1]", '["48", "32"]', "[48.9, 32.9]", "[-48, -32]", "[true]")
        ),
        *({"data_offsets": o} for o in (None, 5, [0], [0, 1, 2], [0.0, 6144.0], ["0", "6144"], [-1, 6143])),
    ],
    ids=str,
)
def test_an_entry_of_another_kind_in_a_header(changes: dict[str, Any], single: Path) -> None:
    data = (single / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[QKV] |= changes
    text = json.dumps(header).encode()
    (single / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(single, "damaged or truncated", str(single / SINGLE), f"the entry of {QKV} is not")


def test_json_that_is_nested_too_deeply(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    refused(folder, "damaged or truncated", str(shard), "nested too deeply")
    for name in (INDEX, "config.json"):
        (folder / name).write_text('{"a": ' + DEEP)
        refused(folder, f"{name} is not valid JSON", str(folder / name))


@pytest.mark.parametrize("stale", [5, "model.safetensors", {}, None, [5]])
def test_stale_shards_that_are_no_names(folder: Path, stale: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"stale_in": stale}}))
    refused(folder, "not valid", f"metadata.stale_in in {folder / INDEX}", "a list of shards")


def test_index_and_shards_disagree(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    shards = sorted({*index["weight_map"].values()})
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"ghost": shards[0]}}))
    refused(folder, "not in its shard", "ghost")
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    refused(folder, "lists no tensors")
    (folder / INDEX).write_text(json.dumps(index))
    save_file(load_file(folder / shards[0]) | load_file(folder / shards[1]), folder / shards[1])
    refused(folder, "stored twice", shards[0], shards[1])


def test_two_sets_of_weights(folder: Path, model: Ling, tmp_path: Path) -> None:
    """Transformers takes the single file; an index that names it, too, is one set."""
    single = save(model, tmp_path / "single")
    shutil.copy(single / SINGLE, folder)
    refused(folder, "two sets of weights", str(folder), SINGLE, INDEX, "move")
    names = CheckpointReader(single).names()
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert CheckpointReader(single).names() == names


def test_config_contradicts_the_weights(single: Path) -> None:
    edit_config(single, vocab_size=97)
    refused(single, "wrong shape", "word_embeddings.weight", "[96, 32]", "[97, 32]")
    edit_config(
        single, vocab_size=96, num_hidden_layers=6, layer_kinds=["lightning", "mla"] * 2 + ["mla"] * 2, num_nextn_predict_layers=0
    )
    refused(single, "missing", "model.layers.5.")
    edit_config(
        single, num_hidden_layers=4, layer_kinds=["lightning", "mla"] * 2, num_nextn_predict_layers=1, num_shared_experts=0
    )
    refused(single, "not part of the model", "shared_experts")
    edit_config(single, num_shared_experts=1, tie_word_embeddings=True)
    refused(single, "tied embeddings", "tie_word_embeddings")
    edit_config(single, tie_word_embeddings=False, num_key_value_heads=3)
    refused(single, "contradicts itself", "num_key_value_heads")


def test_renamed_tensor(single: Path) -> None:
    edit_tensors(single, lambda t: t.update({QKV.replace("query_key_value", "qkv"): t.pop(QKV)}))
    refused(single, "a tensor is missing", QKV, "nearest:  model.layers.0.attention.qkv.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(single: Path, value: float) -> None:
    edit_tensors(single, lambda t: t[QKV][3].__setitem__(slice(0, 2), value))
    refused(single, "NaN or infinite", QKV, "2 of ")


def test_quantised_weights(single: Path) -> None:
    """FP8 with the right scales is read; without, or with wrong ones, it is refused, as are packed integers."""
    scale = f"{QKV}_scale_inv"
    edit_tensors(single, lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn), scale: torch.ones(1, 1)}))
    assert openling.load(single).config.hidden_size == 32
    edit_tensors(single, lambda t: t.update({scale: torch.ones(1, 2)}))
    refused(single, "wrong shape", scale, "[1, 2]", "[1, 1]")
    edit_tensors(single, lambda t: t.pop(scale))
    refused(single, "has no scale", QKV)
    edit_tensors(single, lambda t: t.update({QKV: t[QKV].float(), scale: torch.ones(1, 1)}))
    refused(single, "scale without its FP8 tensor", scale)
    edit_tensors(single, lambda t: (t.pop(scale), t.update({QKV.replace("weight", "qweight"): torch.ones(1, 1)})))
    refused(single, "quantised to integers", "qweight")


def test_wrong_or_broken_tokenizer(single: Path) -> None:
    write_tokenizer(single, 97)
    refused(single, "another model", "id 96", "vocab_size = 96")
    (single / "tokenizer.json").write_text("{}")
    refused(single, "tokenizer cannot be read")


# Wrong targets


def test_existing_output_is_refused_before_anything_is_done(model: Ling, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        save(model, out)
    assert list(tmp_path.iterdir()) == [out]
    assert not list(out.iterdir())


def test_no_space(model: Ling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("openling.weights.io.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match="not enough space"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_disk_full_half_way(model: Ling, tmp_path: Path) -> None:
    """A real limit of the system on file sizes: the third shard meets it."""
    code = (
        "import resource, signal, torch; from pathlib import Path; from openling.weights.io import FolderWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        f"with FolderWriter({str(tmp_path / 'out')!r}, shard_bytes=40000) as writer:\n"
        "    [writer.add(str(i), torch.zeros(size)) for i, size in enumerate((9000, 9000, 20000))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "openling.errors.UserError: no space left while writing; nothing was kept" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EROFS, UserError, "cannot be written"),
        (errno.EACCES, UserError, "cannot be written"),
        (errno.ENOSPC, UserError, "no space left"),
        (errno.EIO, Failure, "writing failed"),
    ],
)
def test_errors_of_the_system(number: int, kind: type, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=words), FolderWriter(tmp_path / "out") as writer:
        writer.add("a", torch.zeros(3))
        monkeypatch.setattr("openling.weights.io.os.fsync", fail)
    assert not list(tmp_path.iterdir())


def test_target_below_a_file(model: Ling, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save(model, tmp_path / "file" / "out")


def test_two_writers_and_a_killed_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with FolderWriter(out) as first:
        first.add("a", torch.ones(3))
        with pytest.raises(UserError, match="another process"), FolderWriter(out):
            pass
    assert torch.equal(CheckpointReader(out).read("a"), torch.ones(3))
    code = (
        "import os, torch; from openling.weights.io import FolderWriter\n"
        f"writer = FolderWriter({str(tmp_path / 'killed')!r}, shard_bytes=8).__enter__()\n"
        "[writer.add(str(i), torch.zeros(9)) for i in range(4)]; os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code])
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.partial").exists()
    with FolderWriter(tmp_path / "killed") as writer:
        writer.add("a", torch.ones(3))
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [SINGLE]
    assert not (tmp_path / ".killed.partial").exists()


def test_source_is_untouched(tmp_path: Path) -> None:
    source = GOLDEN / "ling-2.0-tiny"
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    save(openling.load(source).model, tmp_path / "out", source=source)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before


def test_reading_a_tokenizer_warns_of_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """transformers reads config.json beside it, and knows neither our model types nor all keys of older ones."""
    said: list[logging.LogRecord] = []
    for handler in logging.getLogger("transformers").handlers:
        monkeypatch.setattr(handler, "emit", said.append)
    write_tokenizer(folder, 20)
    edit_config(folder, rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64})
    assert load_tokenizer(folder) is not None
    assert not said and not recwarn.list
