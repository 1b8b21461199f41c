"""Every way a migration is refused, before any weight is read and with nothing left behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import (
    VOCABULARY,
    Migrated,
    Place,
    byte_tokenizer,
    hashes,
    in_child,
    make_llama,
    openling_command,
    refused,
    weights,
)

import openling
from openling.errors import Failure
from openling.migrate import pipeline
from openling.migrate.journal import run_folder
from openling.weights.io import CheckpointReader

# ---------------------------------------------------------------------------------------------------------------------
# Refused before any work
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which nothing may appear, while no weight may be read and the source may not change."""
    before = hashes(place.teacher)

    def no_reading(*args: object) -> None:
        raise AssertionError("weights were read before the request was refused")

    monkeypatch.setattr(CheckpointReader, "read", no_reading)
    yield tmp_path
    assert hashes(place.teacher) == before
    assert not {p.name for p in tmp_path.iterdir()} & {"out", "out.run", ".out.partial"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stage", "linear-warmup"], ["no lightning layer", "--stage lightning"]),
        (["--stage", "mla-warmup"], ["no mla layer", "--stage lightning"]),
        (["--stage", "lightening"], ["unknown stage", "nearest:  lightning"]),
        (["--stages", "mla,lightning"], ["published order", "nearest:  stages = lightning,mla"]),
        (["--stages", "mla,mla"], ["each once", "nearest:  stages = mla"]),
        (["--stages", "[]"], ["--stages"]),
        (["--preset", "bset"], ["nearest:  best"]),
        (["--stge", "lightning"], ["unknown argument", "nearest:  --stage"]),
        (["--linear_warmup.train.lrr", "1"], ["nearest:  --linear_warmup.train.lr"]),
        (["--tokens", "0"], ["--tokens", "positive"]),
        (["--tokens", "-1"], ["--tokens", "positive"]),
        (["--tokens", "abc"], ["--tokens", "abc"]),
        (["--group-size", "7"], ["divide", "nearest:  4"]),
        (["--group-size", "2", "--layout", "1,2"], ["--layout 1,2", "no --group-size"]),
        (["--layout.group_size", "2", "--layout", "none"], ["--layout none", "no --group-size"]),
        (["--layout", "none", "--stage", "mla"], ["has no stage mla", "another --layout"]),
        (["--layout.kv_lora_rank", "-1"], ["where:    --layout.kv_lora_rank", "-1"]),
        (["--layout.q_lora_rank", "0"], ["q_lora_rank"]),
        (["--layout.qk_rope_head_dim", "3"], ["qk_rope_head_dim"]),
        (["--text", "nofile.txt"], ["no such text", "nofile.txt"]),
        (["--eval-text", "kjvv"], ["no such text", "nearest:  kjv"]),
        (["--device", "gpu"], ["--device", "auto, cpu or cuda"]),
        (["--teacher", "nowhere"], ["no such folder", "nowhere"]),
        (["--linear_warmup.train.lr", "Infinity"], ["lr", "finite"]),
        (["--linear_warmup.train.steps", "3"], ["exactly one of steps and tokens"]),
        (["--mla_warmup.train.sequence_length", "1000000"], ["too short", "mla_warmup"]),
        (["--resume"], ["nothing to resume"]),
        (["--seed", "1" + "0" * 30], ["--seed"]),
        (["more"], ["unknown argument", "more"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_bad_requests(words: list[str], said: list[str], place: Place, untouched: Path) -> None:
    flags = place.flags()
    for name in [flag for flag in flags[::2] if flag in words]:
        del flags[flags.index(name) : flags.index(name) + 2]
    refused(openling_command("migrate", place.teacher, untouched / "out", *words, *flags), *said)


def test_a_run_that_was_killed_before_it_had_a_journal_begins(place: Place, tmp_path: Path, quick: None) -> None:
    run = tmp_path / "out.run"
    run.mkdir()
    (run / ".lock").touch()
    (run / "mine.txt").touch()
    refused(place.migrate(tmp_path / "out", "--resume"), "something else")
    (run / "mine.txt").unlink()
    assert place.migrate(tmp_path / "out", "--resume").code == 0


def test_settings_may_stand_before_the_folders(place: Place, untouched: Path) -> None:
    result = openling_command("migrate", "--conversion.damping", "0.5", place.teacher, untouched / "out", "--dry-run")
    assert (result.code, json.loads(result.out)["conversion"]["damping"]) == (0, 0.5)
    refused(openling_command("migrate", "--conversion.damping", "--dry-run", place.teacher, untouched / "out"), "needs a value")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("short.txt", b"hi", "too short"),
        ("latin.txt", b"caf\xe9 " * 400, "not UTF-8"),
        ("empty.txt", b" \n", "empty"),
        ("page.pdf", b"%PDF", "kind of file"),
        ("rows.jsonl", b'{"text": 3}\n', "line 1"),
    ],
)
@pytest.mark.parametrize("flag", ["text", "eval-text"])
def test_bad_texts(name: str, data: bytes, said: str, flag: str, place: Place, untouched: Path) -> None:
    (untouched / name).write_bytes(data)
    refused(place.migrate(untouched / "out", **{flag: untouched / name}), said)


def test_one_file_cannot_be_learnt_from_and_held_out(place: Place, untouched: Path) -> None:
    refused(place.migrate(untouched / "out", **{"eval-text": place.calibration}), "too short", "heldout")


@pytest.mark.parametrize("name", [f"{letter}.txt" for letter in "abcdefghijklmnop"])
def test_any_name_of_a_text_will_do(name: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file is read whole, whatever part its name would hash to; so are names with commas."""

    class Enough(Exception):
        pass

    def stop(*args: object) -> None:
        raise Enough

    monkeypatch.setattr(pipeline, "_load", stop)
    text = tmp_path / f"x,{name}"
    shutil.copy(place.calibration, text)
    with pytest.raises(Enough):
        place.migrate(tmp_path / "out", text=text)
    assert not (tmp_path / "out.run").exists()


def test_bad_outputs(place: Place, untouched: Path) -> None:
    (untouched / "file").write_text("x")
    (untouched / "folder").mkdir()
    (untouched / "dangling").symlink_to(untouched / "nowhere")
    for name in ("file", "folder", "dangling"):
        refused(place.migrate(untouched / name), "exists already", name)
    refused(place.migrate(place.teacher), "exists already")
    refused(place.migrate(place.teacher / "out"), "only read")
    for to in ("dcp", "hf"):
        refused(openling_command("convert", place.teacher, place.teacher / "sub" / "out", "--to", to), "only read", "sub/out")
    (untouched / "link").symlink_to(place.teacher)
    refused(openling_command("delta", "make", place.teacher, untouched, untouched / "link" / "out"), "only read")
    refused(openling_command("delta", "apply", place.teacher, untouched / "folder", untouched / "folder" / "out"), "only read")
    refused(openling_command("convert", place.teacher, place.teacher, "--to", "dcp"), "exists already")
    refused(place.migrate(Path()), "exists already")
    refused(place.migrate(Path("/")), "exists already")
    refused(place.migrate(untouched / "file" / "out"), "cannot be written")
    refused(place.migrate(Path("/proc/openling-out")), "cannot be written")
    refused(place.migrate(untouched / ("x" * 300)))
    (untouched / "mine.run").mkdir()
    (untouched / "mine.run" / "notes").write_text("x")
    refused(place.migrate(untouched / "mine"), "something else")
    assert (untouched / "file").read_text() == (untouched / "mine.run" / "notes").read_text() == "x"
    assert list((untouched / "folder").iterdir()) == []


def test_a_folder_that_may_not_be_written(place: Place, tmp_path: Path) -> None:
    target = tmp_path / "locked"
    target.mkdir()
    target.chmod(0o555)

    def as_nobody() -> int:
        if os.getuid() == 0:
            for folder in (tmp_path, *tmp_path.parents):
                with contextlib.suppress(OSError):
                    folder.chmod(folder.stat().st_mode | 0o055)
            os.setresuid(65534, 65534, 65534)
        result = place.migrate(target / "out")
        return result.code if "cannot be written" in result.err and "Traceback" not in result.err else 50

    modes = {folder: folder.stat().st_mode for folder in tmp_path.parents}
    try:
        assert in_child(as_nobody) == 2
    finally:
        for folder, mode in modes.items():
            if folder.stat().st_mode != mode:
                folder.chmod(mode)
    assert list(target.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("tmpfs cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("command", ["convert", "migrate"])
def test_a_dry_run_refuses_what_the_command_would(place: Place, tmp_path: Path, command: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "five.txt").write_text("five words are too few")
    text = ["--text", place.calibration]
    for words, told in (
        ((tmp_path / "there", *text), "the output exists already"),
        ((place.teacher / "inside", *text), "inside a folder that is only read"),
        ((tmp_path / "out", "--text", tmp_path / "none.txt"), "none.txt"),
        ((tmp_path / "out", "--text", tmp_path / "five.txt"), "the text is too short"),
    ):
        refused(openling_command(command, place.teacher, *words, "--dry-run"), told)


def test_a_full_disk(place: Place, migrated: Migrated, small_disk: Callable[[str], Path], quick: None) -> None:
    disk = small_disk("2m")
    refused(place.migrate(disk / "out"), "no space left")
    assert list(disk.iterdir()) == []
    disk = small_disk("20m")
    # It fills up later: before a stage is converted, and before one is trained.
    for later in ("to_lightning", "train"):
        real = getattr(pipeline, later)

        def filling(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - (64 << 10)))
            return _real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, later, filling)
            begun = (disk / "out.run").exists()
            refused(place.migrate(disk / "out", *(["--resume"] if begun else [])), "space")
        assert not (disk / "out").exists()
        (disk / "ballast").unlink()
    assert place.migrate(disk / "out", "--resume").code == 0
    assert weights(disk / "out") == weights(migrated.out)


def test_a_run_goes_on_in_the_space_that_it_took(place: Place, tmp_path: Path, quick: None) -> None:
    def needed(*words: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline.shutil, "disk_usage", lambda path: argparse.Namespace(free=-(1 << 40)))
            result = place.migrate(tmp_path / "out", *words)
        refused(result, "no space left for the run")
        (found,) = re.findall(r"expected: *([\d,]+)", result.err)
        return int(found.replace(",", ""))

    before = needed()

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise Failure("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train", stopped)
        assert place.migrate(tmp_path / "out").code == 1
    stage = (tmp_path / "out.run" / "stages" / "lightning" / "model.safetensors").stat().st_size
    assert stage < before - needed("--resume") < stage + (1 << 20)
    assert place.migrate(tmp_path / "out", "--resume").code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad models
# ---------------------------------------------------------------------------------------------------------------------


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def large_tokenizer(folder: Path) -> None:
    tokenizer = openling.load(folder).tokenizer
    tokenizer.add_tokens([f"<{i}>" for i in range(10)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
        (truncate, "truncated"),
        (poison, "NaN"),
        (without_tokenizer, "tokenizer"),
        (large_tokenizer, "ids beyond the vocabulary"),
        (edit_config(architectures=["GPT2LMHeadModel"]), "unknown architecture"),
        (edit_config(intermediate_size=100), "contradicts the weights"),
        (edit_config(num_hidden_layers=6), "contradicts the weights"),
        (edit_config(num_key_value_heads=3), "contradicts itself"),
        (edit_config(partial_rotary_factor=0.5), "rotates whole heads"),
        (edit_config(rope_parameters={"rope_theta": 0}), "rope_theta"),
        (edit_config(rope_parameters={"rope_type": "yarn", "factor": -2}), "rope_scaling.factor"),
        (edit_config(rope_parameters={"rope_type": "yarn"}), "rope_scaling.factor"),
        (edit_config(rope_parameters={"rope_type": "linear", "factor": 0}), "rope_scaling.factor"),
        (edit_config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor"),
        (edit_config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}), "rope_scaling.beta_fast"),
    ],
)
def test_bad_models(damage: Callable[[Path], object], said: str, place: Place, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(place.teacher, model)
    damage(model)
    before = hashes(model)
    refused(place.migrate(tmp_path / "out", model=model), said)
    if damage is not without_tokenizer:  # a teacher may lack what the model has
        refused(place.migrate(tmp_path / "out", "--teacher", model), said)
    assert hashes(model) == before
    assert {p.name for p in tmp_path.iterdir()} <= {"model"}


def test_a_smaller_tokenizer_is_allowed(place: Place, tmp_path: Path, quick: None) -> None:
    model = make_llama(tmp_path / "model")
    byte_tokenizer(model, vocabulary=200)
    assert place.migrate(tmp_path / "out", "--stage", "lightning", model=model).code == 0


def test_teachers_that_do_not_fit(place: Place, migrated: Migrated, tmp_path: Path) -> None:
    larger = make_llama(tmp_path / "larger", vocab_size=VOCABULARY + 40)
    other = make_llama(tmp_path / "other")
    byte_tokenizer(other, reverse=True)
    out = tmp_path / "out"
    refused(place.migrate(out, "--teacher", larger), "another vocabulary", "300", "260")
    refused(place.migrate(out, "--teacher", other), "another tokenizer")
    refused(place.migrate(out, "--teacher", migrated.out), "converted itself")


def test_stages_on_a_hybrid(place: Place, migrated: Migrated, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(place.migrate(out, model=migrated.out), "converted already", "mla-warmup")
    refused(place.migrate(out, "--stage", "lightning", model=migrated.out), "converted already")
    refused(place.migrate(out, "--stage", "mla", model=migrated.out), "no GQA layer left", "mla-warmup")
    refused(place.migrate(out, "--stage", "mla-warmup", model=migrated.out), "--teacher")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_is_asked_of_which_model(place: Place, tmp_path: Path) -> None:
    """Whatever the stages: the run itself refuses the same."""
    out = tmp_path / "out"
    told = {
        ("no-such-model", out): "no-such-model",
        (place.teacher, out, "--teacher", "no-such-teacher"): "no-such-teacher",
        (place.teacher, out, "--resume"): "nothing to resume",
        (place.teacher, out, "--stage", "linear-warmup"): "no lightning layer",
        (place.teacher, out, "--stage", "mla", "--layout", "3,99"): "rising numbers",
    }
    if not torch.cuda.is_available():
        told[(place.teacher, out, "--device", "cuda")] = "cuda"
    for words, part in told.items():
        for dry in ((), ("--dry-run",)):
            refused(openling_command("migrate", *words, *dry, "--text", place.calibration), part)
    assert not out.exists() and not run_folder(out).exists()
