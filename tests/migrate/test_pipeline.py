"""Whole migrations of tiny models through the command line: results, and resumption after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    COMMON,
    GOLDEN,
    SHAPE,
    VOCABULARY,
    Migrated,
    Place,
    Result,
    Unmeasured,
    byte_tokenizer,
    hashes,
    in_child,
    make_llama,
    refused,
    weights,
    weights_only,
)
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import openling
from openling.config.migrate import STAGES
from openling.migrate import pipeline
from openling.migrate.journal import run_folder

# ---------------------------------------------------------------------------------------------------------------------
# What a migration yields
# ---------------------------------------------------------------------------------------------------------------------


def test_the_hybrid_loads_everywhere_with_the_same_logits(migrated: Migrated) -> None:
    assert migrated.result.code == 0, migrated.result.err
    ours = openling.load(migrated.out)
    assert ours.config.layer_kinds == ("lightning", "lightning", "lightning", "mla")
    assert ours.tokenizer.get_vocab() == openling.load(migrated.out).tokenizer.get_vocab()
    ids = torch.randint(VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(migrated.out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        found = ours.model.float()(ids)
        # The same operations in FP32 up to their order: 1e-4 is the project's bound.
        torch.testing.assert_close(theirs(ids).logits, found, atol=1e-4, rtol=0)
    assert (found.dtype, found.shape) == (torch.float32, (2, 41, VOCABULARY))


def test_the_source_is_untouched_and_the_folders_are_complete(migrated: Migrated, place: Place) -> None:
    assert hashes(place.teacher) == migrated.before
    names = {p.name for p in migrated.out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md", "openling.json"} <= names
    assert {p.name for p in migrated.out.parent.iterdir()} == {"hybrid", "hybrid.run"}
    run = {p.name for p in migrated.run.iterdir() if not p.name.startswith(".")}
    assert run == {"journal.json", "report.json", "report.html", "linear-warmup", "mla-warmup"}
    for warmup in ("linear-warmup", "mla-warmup"):
        rows = [json.loads(line) for line in (migrated.run / warmup / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]  # 512 tokens in steps of 4 x 32
        assert not (migrated.run / warmup / "checkpoints").exists()
    report = json.loads((migrated.run / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher", *STAGES]
    assert all(stage["domains"] for stage in report["stages"])
    assert report["command"].startswith("openling ")
    check_bytes_and_seconds(migrated, place, report["stages"][1:])
    assert "<html" in (migrated.run / "report.html").read_text()


def check_bytes_and_seconds(migrated: Migrated, place: Place, stages: list[dict[str, Any]]) -> None:
    """Weights are read once and written after each stage; what changed is BF16 mixers of new kinds, then what trained."""
    tensors = load_file(migrated.out / "model.safetensors")

    def stored(*parts: str) -> int:
        return sum(t.nbytes for name, t in tensors.items() if re.search("|".join(parts), name))

    assert [s["bytes"]["read"] for s in stages] == [(place.teacher / "model.safetensors").stat().st_size, 0, 0, 0]
    assert stages[-1]["bytes"]["written"] == (migrated.out / "model.safetensors").stat().st_size
    mla = stored(r"layers\.3\.attention\.")
    trained = stored(r"layers\.[012]\.attention\.(query_key_value|query_layernorm|key_layernorm|g_proj|g_norm)\.")
    assert [s["bytes"]["changed"] for s in stages] == [stored(r"layers\.[012]\.attention\."), trained, mla, mla]
    for one in stages:
        assert sum(one["spent"].values()) == pytest.approx(one["seconds"])
        assert min(one["spent"].values()) > 0


def test_four_single_stages_make_the_same_bits(migrated: Migrated, place: Place, tmp_path: Path, quick: None) -> None:
    model = place.teacher
    for stage in STAGES:
        teacher = ["--teacher", place.teacher] if "warmup" in stage else []
        result = place.migrate(tmp_path / stage, "--stage", stage, *teacher, model=model)
        assert result.code == 0, result.err
        model = tmp_path / stage
    assert weights(model) == weights(migrated.out)
    assert (model / "config.json").read_text() == (migrated.out / "config.json").read_text()


def test_a_teacher_does_not_learn_along(place: Place, tmp_path: Path, quick: None) -> None:
    """Where all mixers train, some are the teacher's own in memory. A stage that reads both models anew ends with the same bits.

    In FP32: for BF16 a CPU casts what the teacher has, and so parts them.
    """
    train = {"trainable": "attention", "train.lr": "0.05", "train.precision": "fp32"}
    flags = [word for name, value in train.items() for word in (f"--linear_warmup.{name}", value)]
    assert place.migrate(tmp_path / "both", "--stages", "lightning,linear-warmup", *flags).code == 0
    assert place.migrate(tmp_path / "half", "--stage", "lightning").code == 0
    teacher = ["--teacher", place.teacher]
    result = place.migrate(tmp_path / "apart", "--stage", "linear-warmup", *teacher, *flags, model=tmp_path / "half")
    assert result.code == 0, result.err
    assert weights(tmp_path / "apart") == weights(tmp_path / "both")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "both"))
    shared = "model.layers.3.attention.dense.weight"
    assert not torch.equal(before[shared], after[shared])


def test_a_teacher_that_is_not_followed_does_not_learn_along_either(place: Place, tmp_path: Path) -> None:
    """The warm-up follows the text alone; what comes after it is measured against the teacher as it was."""
    train = {"trainable": "attention", "train.lr": "0.05", "train.kl": "0", "train.ce": "1", "train.precision": "fp32"}
    flags = [word for name, value in train.items() for word in (f"--linear_warmup.{name}", value)]
    assert place.migrate(tmp_path / "both", "--stages", "lightning,linear-warmup", *flags).code == 0
    teacher, warmed = (json.loads((tmp_path / "both.run" / "report.json").read_text())["stages"][i] for i in (0, -1))
    assert warmed["layers"][3]["kind"] == "gqa" and warmed["layers"][3]["local"] > 0
    for name, found in warmed["domains"].items():
        assert found["teacher_loss"] == teacher["domains"][name]["loss"]


def test_paper_preset_needs_no_teacher_for_a_single_warmup(place: Place, tmp_path: Path, quick: None) -> None:
    assert place.migrate(tmp_path / "a", "--stage", "lightning", "--preset", "paper").code == 0
    result = place.migrate(tmp_path / "b", "--stage", "linear-warmup", "--preset", "paper", model=tmp_path / "a")
    assert result.code == 0, result.err


def test_the_plan_of_a_run_is_of_its_own_layout(place: Place, tmp_path: Path, quick: None) -> None:
    assert place.migrate(tmp_path / "out", "--layout.qk_rope_head_dim", "4").code == 0
    planned = json.loads((tmp_path / "out.run" / "report.json").read_text())["plan"]
    config = openling.load(tmp_path / "out").config
    assert config.qk_rope_head_dim == planned["layout"]["qk_rope_head_dim"] == 4
    assert planned["kv_bytes_per_token"] == 2 * (config.kv_lora_rank + 4)  # one MLA layer, BF16


def test_mla_alone_on_a_gqa_model(place: Place, tmp_path: Path, quick: None) -> None:
    result = place.migrate(tmp_path / "mla", "--stage", "mla")
    assert result.code == 0, result.err
    assert "all become MLA" in result.err
    assert set(openling.load(tmp_path / "mla").config.layer_kinds) == {"mla"}


def ling_2_0(folder: Path) -> Path:
    """The golden MoE teacher (QK-norm, half rotated, MTP), with a tokenizer."""
    shutil.copytree(GOLDEN / "ling-2.0-tiny", folder)
    (folder / "expected.safetensors").unlink()
    byte_tokenizer(folder, vocabulary=json.loads((folder / "config.json").read_text())["vocab_size"])
    return folder


def qwen2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(num_hidden_layers=4, tie_word_embeddings=True, **SHAPE, **COMMON)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("make", [ling_2_0, qwen2])
def test_other_families(make: Callable[[Path], Path], place: Place, tmp_path: Path, quick: None) -> None:
    teacher = make(tmp_path / "teacher")
    before, out = hashes(teacher), tmp_path / "hybrid"
    result = place.migrate(out, model=teacher)
    assert result.code == 0, result.err
    assert hashes(teacher) == before
    ours, old = openling.load(out), openling.load(teacher)
    assert ours.config.layer_kinds[-1] == "mla"
    assert "gqa" not in ours.config.layer_kinds
    assert ours.config.num_nextn_predict_layers == old.config.num_nextn_predict_layers
    ids = torch.randint(ours.config.vocab_size, (1, 33), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model.float()(ids), atol=1e-4, rtol=0)  # as above


@pytest.mark.parametrize(
    ("layers", "group", "said"), [(6, 6, "does not divide 6"), (5, 5, "does not divide 5"), (8, 8, "as Ling")]
)
def test_layer_counts(layers: int, group: int, said: str, place: Place, tmp_path: Path, quick: None) -> None:
    teacher = make_llama(tmp_path / "teacher", layers=layers)
    result = place.migrate(tmp_path / "out", "--stage", "lightning", model=teacher)
    assert result.code == 0, result.err
    assert f"groups of {group}" in result.err
    assert said in result.err
    kinds = openling.load(tmp_path / "out").config.layer_kinds
    assert kinds == ("lightning",) * (group - 1) + ("gqa",)


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed
# ---------------------------------------------------------------------------------------------------------------------


# Every step of a run after which the disk or the model is another one.
MOMENTS = (
    (Path, "rename"),
    (Path, "replace"),
    (Path, "mkdir"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (torch.optim.AdamW, "step"),
    (pipeline, "round_to"),
    (pipeline.CheckpointReader, "read"),
)


@contextlib.contextmanager
def counted(at: Callable[[int], None]) -> Iterator[None]:
    """Call `at` with 1, 2, ... before each of the moments."""
    number = 0
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in MOMENTS:
            real = getattr(owner, name)

            def wrapped(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
                nonlocal number
                number += 1
                at(number)
                return _real(*args, **kwargs)

            patch.setattr(owner, name, wrapped)
        yield


def die_at(moment: int, number: int) -> None:
    if number == moment:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def moments(place: Place, migrated: Migrated, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many there are in a whole run (not in the first one: that also warms up what libraries do once)."""
    seen = 0

    def note(number: int) -> None:
        nonlocal seen
        seen = number

    with weights_only(), counted(note):
        assert place.migrate(tmp_path_factory.mktemp("count") / "out").code == 0
    return seen


# Spread over the run; OPENLING_ALL_KILLS=1 tries every moment.
@pytest.mark.parametrize("share", [(i + 0.5) / 8 for i in range(8)])
def test_killed_at_any_moment(share: float, moments: int, migrated: Migrated, place: Place, tmp_path: Path, quick: None) -> None:
    check_kill(max(1, round(share * moments)), migrated, place, tmp_path)


@pytest.mark.skipif(not os.environ.get("OPENLING_ALL_KILLS"), reason="minutes: every moment of a run")
def test_killed_at_every_moment(moments: int, migrated: Migrated, place: Place, tmp_path: Path, quick: None) -> None:
    for moment in range(1, moments + 1):
        (tmp_path / str(moment)).mkdir()
        check_kill(moment, migrated, place, tmp_path / str(moment))


def check_kill(moment: int, migrated: Migrated, place: Place, folder: Path) -> None:
    out = folder / "out"

    def die() -> int:
        with counted(lambda number: die_at(moment, number)):
            return place.migrate(out).code

    assert in_child(die) == -signal.SIGKILL
    if out.exists():  # only the last rename puts it there, whole
        assert weights(out) == weights(migrated.out)
    begun = (out.with_name("out.run") / "journal.json").exists()
    result = place.migrate(out, *(["--resume"] if begun else []))
    assert result.code == 0, f"moment {moment}: {result.err}"
    assert weights(out) == weights(migrated.out)
    assert (out / "config.json").read_text() == (migrated.out / "config.json").read_text()
    assert {p.name for p in folder.iterdir()} == {"out", "out.run"}
    left = {p.name for p in (folder / "out.run").iterdir() if not p.name.startswith(".")}
    assert left <= {"journal.json", "report.json", "linear-warmup", "mla-warmup"}
    assert not list(folder.rglob("checkpoints"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_warmup(number: int, migrated: Migrated, place: Place, tmp_path: Path, quick: None) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    real = torch.optim.AdamW.step

    def interrupted() -> int:
        with pytest.MonkeyPatch.context() as patch:

            def step(*args: Any, **kwargs: Any) -> Any:
                os.kill(os.getpid(), number)
                return real(*args, **kwargs)

            patch.setattr(torch.optim.AdamW, "step", step)
            result = place.migrate(out)
        said.write_text(result.err)
        return result.code

    assert in_child(interrupted) == 128 + number
    assert "Traceback" not in said.read_text()
    assert "--resume" in said.read_text()
    assert not out.exists()
    assert place.migrate(out, "--resume").code == 0
    assert weights(out) == weights(migrated.out)


@pytest.mark.parametrize(("warmup", "steps_left"), [("linear-warmup", 4), ("mla-warmup", 0)])
def test_work_is_not_repeated(warmup: str, steps_left: int, place: Place, tmp_path: Path, quick: None) -> None:
    """A kill between a warm-up's end and its journal entry costs no training, and no stage before it."""
    out, trained = tmp_path / "out", []

    class Dying(Unmeasured):
        def stage(self, student: object) -> dict[str, Any]:
            if (out.with_name("out.run") / warmup / "train.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().stage(student)

    def die() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "Measurer", Dying)
            return place.migrate(out).code

    assert in_child(die) == -signal.SIGKILL
    real = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(pipeline, "to_lightning")
        patch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (trained.append(1), real(*a, **k))[1])
        assert place.migrate(out, "--resume").code == 0
    assert len(trained) == steps_left  # each warm-up has four


# ---------------------------------------------------------------------------------------------------------------------
# Resume that cannot be
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(place: Place, tmp_path: Path, quick: None) -> Path:
    """OUT of a run that was killed in its second stage, from a copy of the teacher beside it."""
    shutil.copytree(place.teacher, tmp_path / "teacher")
    shutil.copy(place.calibration, tmp_path / "cal.txt")

    def die() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
            return place.migrate(tmp_path / "out", model=tmp_path / "teacher", text=tmp_path / "cal.txt").code

    assert in_child(die) == -signal.SIGKILL
    return tmp_path / "out"


def resume(place: Place, out: Path, *words: object, **changes: object) -> Result:
    fields = {"text": out.with_name("cal.txt")} | changes
    return place.migrate(out, "--resume", *words, model=out.with_name("teacher"), **fields)


def test_resume_refuses_what_has_changed(place: Place, stopped: Path) -> None:
    refused(resume(place, stopped, tokens=1024), "settings have changed", "linear_warmup.train.tokens", "1024", "512")
    refused(resume(place, stopped, "--stage", "lightning"), "settings have changed", "stages")
    refused(place.migrate(stopped, model=stopped.with_name("teacher")), "was begun", "--resume")
    text, weights_file = stopped.with_name("cal.txt"), stopped.with_name("teacher") / "model.safetensors"
    whole = text.read_text()
    text.write_text("X" + whole)
    refused(resume(place, stopped), "texts")
    text.write_text(whole)
    data = bytearray(weights_file.read_bytes())
    data[-100] ^= 1  # the same shapes, another model
    weights_file.write_bytes(data)
    refused(resume(place, stopped), "source model")
    data[-100] ^= 1
    weights_file.write_bytes(data)
    shutil.rmtree(stopped.with_name("out.run") / "stages")
    refused(resume(place, stopped), "no such folder")


def test_a_damaged_journal(place: Place, stopped: Path) -> None:
    (stopped.with_name("out.run") / "journal.json").write_text('{"done": [')
    refused(resume(place, stopped), "journal.json is not valid JSON")


def test_a_second_process_is_refused(place: Place, stopped: Path) -> None:
    with pipeline.sole_writer(stopped.with_name("out.run")):
        refused(resume(place, stopped), "another process")
        refused(place.migrate(stopped), "another process")  # said before "was begun": --resume would not help
    assert resume(place, stopped).code == 0


def test_a_setting_that_is_newer_than_the_run_does_not_hinder_it(place: Place, stopped: Path) -> None:
    """Nor does a section that was null and is one now go by unseen."""
    journal = run_folder(stopped) / "journal.json"
    begun = json.loads(journal.read_text())
    del begun["config"]["recall"]["keys"], begun["config"]["conversion"]["layer_score"]
    begun["config"]["text"] |= {"synthesis": 1}
    journal.write_text(json.dumps(begun))
    refused(resume(place, stopped), "settings have changed", "text.synthesis")
    del begun["config"]["text"]["synthesis"]
    journal.write_text(json.dumps(begun))
    assert resume(place, stopped).code == 0


def test_a_model_that_is_half_converted_is_not_called_the_teacher(place: Place, tmp_path: Path, quick: None) -> None:
    half, told = tmp_path / "half", "no softmax-attention teacher was named"
    assert place.migrate(half, "--stage", "lightning").code == 0
    for words, expected in (((), True), (("--teacher", place.teacher), False)):
        out = tmp_path / f"out-{expected}"
        result = place.migrate(out, "--stage", "mla", *words, model=half)
        assert result.code == 0, result.err
        assert (told in result.err) is expected
        assert (told in json.loads((run_folder(out) / "report.json").read_text())["layout"]["said"]) is expected


def test_resume_of_a_finished_run(place: Place, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "out"
    assert place.migrate(out, "--stage", "lightning").code == 0
    before = hashes(tmp_path)
    again = place.migrate(out, "--stage", "lightning", "--resume")
    assert (again.code, hashes(tmp_path)) == (0, before)
    assert "finished" in again.err
    refused(place.migrate(out, "--stage", "lightning", "--resume", **{"text.calibration_tokens": 256}), "settings have changed")
    refused(place.migrate(out, "--stage", "lightning"), "exists already")
    out.rename(tmp_path / "elsewhere")
    refused(place.migrate(out, "--stage", "lightning", "--resume"), "moved away")
    refused(place.migrate(out, "--stage", "lightning"), "was begun")
