"""A delta and its teacher are the hybrid again, to the bit; everything that is not whole is refused in one message."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import COMMON, GOLDEN, SHAPE, Migrated, Place, hashes, in_child, make_llama, openling_command, refused
from stream_jobs import LING, job, quantised, settings
from stream_jobs import teacher as plain_teacher
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import openling
from openling.migrate.stream import convert_folder
from openling.weights import delta as deltas
from openling.weights.delta import LARGEST, PART_BYTES, dequantise, quantise, read_delta
from openling.weights.fp8 import Form

FORMS = {
    "block": Form("block", "_scale_inv", torch.float32, False, (8, 16)),
    "channel": Form("channel", "_scale", torch.bfloat16, False, (128, 128)),
}


@pytest.fixture(scope="module")
def small(migrated: Migrated, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 delta of a whole migration."""
    out = tmp_path_factory.mktemp("delta") / "small"
    result = openling_command("delta", "make", place.teacher, migrated.out, out)
    assert result.code == 0, result.err
    return out


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but the one that tells how a conversion went about it."""
    return {name: value for name, value in hashes(folder).items() if name != "openling-files.json"}


def apply(teacher: Path, delta: Path, out: Path) -> dict[str, str]:
    result = openling_command("delta", "apply", teacher, delta, out)
    assert result.code == 0, result.err
    return hashes(out)


# ---------------------------------------------------------------------------------------------------------------------
# Round trips
# ---------------------------------------------------------------------------------------------------------------------


def test_an_exact_delta_is_the_hybrid_again(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    before = hashes(place.teacher)
    assert openling_command("delta", "make", place.teacher, migrated.out, tmp_path / "delta", "--exact").code == 0
    assert apply(place.teacher, tmp_path / "delta", tmp_path / "again") == contents(migrated.out)
    assert hashes(place.teacher) == before
    # What is not attention is the teacher's; the LM head, which was tied there, is its embeddings.
    changed = {entry.name for entry in read_delta(tmp_path / "delta").changed}
    assert changed == {name for name in load_file(migrated.out / "model.safetensors") if ".attention." in name}


def test_an_int8_delta_is_what_its_integers_give(migrated: Migrated, place: Place, small: Path, tmp_path: Path) -> None:
    again = apply(place.teacher, small, tmp_path / "again")
    assert again == apply(place.teacher, small, tmp_path / "twice")
    assert {name for name, value in contents(migrated.out).items() if again[name] != value} == {"model.safetensors"}
    assert sum(path.stat().st_size for path in small.glob("*.safetensors")) < 0.7 * changed_bytes(migrated.out)
    old, new = (load_file(folder / "model.safetensors") for folder in (migrated.out, tmp_path / "again"))
    assert list(old) == list(new)
    for name, tensor in old.items():
        if ".attention." in name and tensor.dim() == 2:
            step = tensor.float().abs().amax(1, keepdim=True) / LARGEST
            # Half a step, and the rounding to BF16 of what comes out.
            bound = step / 2 + 2.0**-8 * tensor.float().abs()
            assert ((new[name].float() - tensor.float()).abs() <= bound).all()
        else:
            assert torch.equal(new[name], tensor)
    # Applied to what came out, it is the fixed point: nothing is lost a second time.
    assert openling_command("delta", "make", place.teacher, tmp_path / "again", tmp_path / "exact", "--exact").code == 0
    assert apply(place.teacher, tmp_path / "exact", tmp_path / "third") == again


def changed_bytes(folder: Path) -> int:
    return sum(t.nbytes for name, t in load_file(folder / "model.safetensors").items() if ".attention." in name)


def test_the_card_says_how_it_came_to_be(migrated: Migrated, place: Place, small: Path) -> None:
    about = json.loads((small / "delta.json").read_text())["about"]
    assert about["recipe"]["preset"] == "best"
    assert set(about["losses"]) == {"teacher", "lightning", "linear-warmup", "mla", "mla-warmup"}
    report = json.loads((migrated.run / "report.json").read_text())
    last = report["stages"][-1]["domains"]
    assert {text: row["loss"] for text, row in about["losses"]["mla-warmup"].items()} == {t: a["loss"] for t, a in last.items()}
    assert 0 < about["rounding error"] < 1e-3
    card = (small / "README.md").read_text()
    for part in (
        f"openling delta apply {place.teacher.name} small OUT",
        "mla-warmup 512",
        "before the changed matrices were",
        "| loss on ",
    ):
        assert part in card


def test_a_hybrid_that_has_lost_its_run_can_be_passed_on(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    shutil.copytree(migrated.out, tmp_path / "alone")
    assert openling_command("delta", "make", place.teacher, tmp_path / "alone", tmp_path / "delta").code == 0
    assert read_delta(tmp_path / "delta").about["preset"] == "best"
    assert "Losses were measured" not in (tmp_path / "delta" / "README.md").read_text()


def test_a_report_may_lack_all_but_its_stages(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    shutil.copytree(migrated.out, tmp_path / "hybrid")
    (tmp_path / "hybrid.run").mkdir()
    report = {"title": "hybrid", "stages": [{"name": "mla", "tokens": 7}]}
    (tmp_path / "hybrid.run" / "report.json").write_text(json.dumps(report))
    made = openling_command("delta", "make", place.teacher, tmp_path / "hybrid", tmp_path / "delta")
    assert made.code == 0, made.err
    about = read_delta(tmp_path / "delta").about
    assert about["tokens"] == "mla 7"
    assert "recipe" not in about


def test_files_of_other_names_are_refused(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    shutil.copytree(migrated.out, tmp_path / "hybrid")
    (tmp_path / "hybrid" / "my notes.md").write_text("to be read")
    made = openling_command("delta", "make", place.teacher, tmp_path / "hybrid", tmp_path / "delta")
    refused(made, "a delta takes no file of this name", "my notes.md")
    assert [path.name for path in tmp_path.iterdir()] == ["hybrid"]


def test_large_tensors_are_split_over_parts(
    migrated: Migrated, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "PART_BYTES", 2000)
    for form in ("--exact",), ():
        delta = tmp_path / f"delta{len(form)}"
        assert openling_command("delta", "make", place.teacher, migrated.out, delta, *form).code == 0
        parts = list(delta.glob("delta-*.safetensors"))
        assert len(parts) > 5
        assert max(sum(t.nbytes for t in load_file(part).values()) for part in parts) <= 2000
        found = apply(place.teacher, delta, tmp_path / f"again{len(form)}")
        assert (found == contents(migrated.out)) == bool(form)
    assert PART_BYTES < 25e6


def test_experts_and_mtp_layers(tmp_path: Path) -> None:
    """A teacher of Ling's own names, with experts, MTP and a router's bias: shards of a streamed conversion."""
    teacher = GOLDEN / "ling-2.0-tiny"
    assert openling_command("convert", teacher, tmp_path / "hybrid", "--weights-only").code == 0
    assert openling_command("delta", "make", teacher, tmp_path / "hybrid", tmp_path / "delta", "--exact").code == 0
    delta = read_delta(tmp_path / "delta")
    assert all(".attention." in entry.name for entry in delta.changed)
    again = apply(teacher, tmp_path / "delta", tmp_path / "again")
    assert again == contents(tmp_path / "hybrid")
    assert openling_command("convert", teacher, tmp_path / "linked", "--weights-only", "--link").code == 0
    stale = json.loads((tmp_path / "linked" / "model.safetensors.index.json").read_text())["metadata"].get("stale_in")
    result = openling_command("delta", "make", teacher, tmp_path / "linked", tmp_path / "no")
    if stale:
        refused(result, "shares files with another", "openling convert --to hf")
    else:
        assert result.code == 0, result.err


@pytest.mark.parametrize("family", ["LlamaForCausalLM", LING])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_fp8_matrices_and_scales_are_named_or_stay_as_they_are(family: str, form: Form, tmp_path: Path) -> None:
    """With q, k and v joined in kept layers (Llama) or not; nothing but FP8 has two dimensions, so the int8 delta is exact."""
    teacher = quantised(plain_teacher(tmp_path / "plain", family), tmp_path / "teacher", form)
    convert_folder(job(teacher, tmp_path / "hybrid", text=False, config=settings(stages=("lightning",))), resume=False)
    assert openling_command("delta", "make", teacher, tmp_path / "hybrid", tmp_path / "delta").code == 0
    changed = {entry.name for entry in read_delta(tmp_path / "delta").changed}
    layers = [i for i, kind in enumerate(openling.load(tmp_path / "hybrid").config.layer_kinds) if kind == "lightning"]
    assert all(name.startswith(tuple(f"model.layers.{i}.attention." for i in layers)) for name in changed)
    assert any(name.endswith(form.suffix) for name in changed)
    assert apply(teacher, tmp_path / "delta", tmp_path / "again") == contents(tmp_path / "hybrid")


# ---------------------------------------------------------------------------------------------------------------------
# Integers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 50)[:, None]
    rows = rows.to(dtype)
    rows[7] = 0
    rows[8, 1:] = 0
    whole, scale = quantise(rows, "w")
    assert (whole.dtype, scale.dtype, list(scale.shape)) == (torch.int8, torch.float32, [50, 1])
    assert whole[[i for i in range(50) if i != 7]].abs().amax(1).eq(LARGEST).all()
    back = dequantise(whole, scale, dtype)
    assert torch.equal(back[7], rows[7])
    tolerance = torch.finfo(dtype).eps * rows.abs().float() + scale / 2 * 1.0001
    assert ((back.float() - rows.float()).abs() <= tolerance).all()
    assert torch.equal(dequantise(*quantise(back, "w"), dtype)[8], back[8])


def test_the_loss_hardly_changes(tmp_path: Path) -> None:
    """A tiny teacher that has learnt its text, so that rounding could spoil something: converted, rounded, measured."""
    text = (json.__doc__ or "") * 2
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **SHAPE, **COMMON))
    teacher = make_llama(tmp_path / "teacher")
    ids = torch.tensor(AutoTokenizer.from_pretrained(teacher)(text)["input_ids"][:512]).view(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(teacher)
    assert openling_command("convert", teacher, tmp_path / "hybrid", "--weights-only", "--stage", "mla").code == 0
    assert openling_command("delta", "make", teacher, tmp_path / "hybrid", tmp_path / "delta").code == 0
    apply(teacher, tmp_path / "delta", tmp_path / "again")

    def loss(folder: Path) -> float:
        with torch.no_grad():
            logits = openling.load(folder, dtype=torch.float32).model(ids)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    assert loss(teacher) < 3  # ln(260) = 5.56 is guessing
    change = loss(tmp_path / "again") - loss(tmp_path / "hybrid")
    assert 0 < abs(change) < 0.02


def test_weights_that_are_not_finite(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    shutil.copytree(migrated.out, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("attention.dense.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    refused(openling_command("delta", "make", place.teacher, tmp_path / "bad", tmp_path / "delta"), "NaN or infinite", name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def damaged(small: Path, folder: Path) -> Path:
    shutil.copytree(small, folder)
    return folder


def test_another_teacher_is_refused(small: Path, place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(place.teacher, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    refused(openling_command("delta", "apply", other, small, tmp_path / "out"), "the delta is of another teacher", "hash")
    # The same tensors in two files, under another folder's name, are the same teacher.
    LlamaForCausalLM.from_pretrained(place.teacher, dtype="auto").save_pretrained(tmp_path / "split", max_shard_size="40KB")
    for path in place.teacher.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert apply(tmp_path / "split", small, tmp_path / "out") == apply(place.teacher, small, tmp_path / "same")
    tokenizer = tmp_path / "split" / "tokenizer.json"
    # Libraries of other versions write the same tokenizer in other bytes: the user's is taken.
    tokenizer.write_text(tokenizer.read_text() + "\n")
    apply(tmp_path / "split", small, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").read_text() == tokenizer.read_text()
    tokenizer.unlink()
    refused(openling_command("delta", "apply", tmp_path / "split", small, tmp_path / "no"), "lacks a file", "tokenizer.json")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("how", ["short", "flipped", "absent", "companion", "result"])
def test_a_damaged_delta_is_refused(how: str, small: Path, place: Place, tmp_path: Path) -> None:
    delta = damaged(small, tmp_path / "delta")
    part, record = delta / "delta-00001.safetensors", delta / "delta.json"
    expected = {"short": "truncated", "flipped": "damaged", "absent": "missing", "companion": "another one", "result": "promises"}
    data = bytearray(part.read_bytes())
    if how == "short":
        part.write_bytes(data[:-1])
    elif how == "flipped":
        data[-1] ^= 1
        part.write_bytes(data)
    elif how == "absent":
        part.unlink()
    elif how == "companion":
        (delta / "hybrid.config.json").write_text("{}")
    else:
        told = json.loads(record.read_text())
        told["result"]["model.safetensors"]["sha256"] = "0" * 64
        record.write_text(json.dumps(told))
    result = openling_command("delta", "apply", place.teacher, delta, tmp_path / "out")
    assert (result.code, "Traceback" in result.err) == (1 if how == "result" else 2, False)
    assert expected[how] in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("format", "openling delta 2", "format"),
        ("form", "int4", "form"),
        ("parts", {"../escape": {"bytes": 1, "sha256": "0"}}, "parts"),
        ("copied", {"/etc/passwd": "delta"}, "copied"),
        ("result", {}, "no hash of"),
        ("shards", {"model.safetensors": [{"name": "x", "dtype": "F31", "shape": [1]}]}, "shards"),
        ("shards", {"model.safetensors": [{"name": "x", "dtype": "F32", "shape": [1], "teacher": ["y"]}]}, "lacks"),
        ("shards", None, "shards"),
    ],
)
def test_a_record_that_makes_no_sense(field: str, value: object, said: str, small: Path, place: Place, tmp_path: Path) -> None:
    delta = damaged(small, tmp_path / "delta")
    told = json.loads((delta / "delta.json").read_text())
    told[field] = value
    (delta / "delta.json").write_text(json.dumps(told))
    refused(openling_command("delta", "apply", place.teacher, delta, tmp_path / "out"), "the record of the delta", said)


def test_what_is_no_delta_and_what_is_in_the_way(small: Path, place: Place, tmp_path: Path) -> None:
    refused(openling_command("delta", "apply", place.teacher, place.teacher, tmp_path / "out"), "delta.json is missing")
    refused(openling_command("delta", "apply", small, place.teacher, tmp_path / "out"), "delta.json is missing")
    refused(openling_command("delta", "apply", place.teacher, small, place.teacher), "exists already")
    refused(openling_command("delta", "make", place.teacher, tmp_path / "none", tmp_path / "out"), "no such folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "where"), [("make", "write_shard"), ("make", "add_file"), ("apply", "write_all"), ("apply", "add_file")]
)
def test_a_kill_leaves_nothing_that_looks_finished(
    what: str, where: str, small: Path, migrated: Migrated, place: Place, tmp_path: Path
) -> None:
    """Killed while the first large file is written, and when only small ones are missing."""
    words = ("make", place.teacher, migrated.out) if what == "make" else ("apply", place.teacher, small)

    def die() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deltas.FolderWriter if where == "add_file" else deltas, where, kill)
            return openling_command("delta", *words, tmp_path / "out").code

    assert in_child(die) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert openling_command("delta", *words, tmp_path / "out").code == 0
    if what == "make":
        assert {name: value for name, value in hashes(tmp_path / "out").items() if name.endswith(".safetensors")} == {
            name: value for name, value in hashes(small).items() if name.endswith(".safetensors")
        }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def kill(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "shard from the teacher": (lambda r: r["copied"].update({"model.safetensors": "teacher"}), "both made of tensors and copied"),
    "more weights": (lambda r: r["copied"].update({"other.safetensors": "teacher"}), "other.safetensors holds weights"),
    "no shards": (lambda r: (r.update(shards={}), r["result"].pop("model.safetensors")), "lists no tensors"),
    "empty shard": (lambda r: r["shards"].update({"model.safetensors": []}), "lists no tensors"),
    "a tensor twice": (lambda r: r["shards"]["model.safetensors"].append(r["shards"]["model.safetensors"][0]), "listed twice"),
    "a hash too many": (lambda r: r["result"].update({"x.py": {"bytes": 1, "sha256": "0" * 64}}), "hash of x.py"),
    "no config": (lambda r: (r["copied"].pop("config.json"), r["result"].pop("config.json")), "no config.json"),
}


@pytest.mark.parametrize("how", RECORDS)
def test_a_record_that_gives_no_whole_folder_is_refused(how: str, small: Path, place: Place, tmp_path: Path) -> None:
    record, (edit, said) = damaged(small, tmp_path / "delta") / "delta.json", RECORDS[how]
    value = json.loads(record.read_text())
    edit(value)
    record.write_text(json.dumps(value))
    refused(openling_command("delta", "apply", place.teacher, record.parent, tmp_path / "out"), "contradicts itself", said)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
