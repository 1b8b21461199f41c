"""Whole migrations of tiny models through the command line: results, resumption after a kill, and every way to be refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import openling
from openling.cli import main
from openling.config.migrate import STAGES
from openling.migrate import pipeline
from openling.weights.io import CheckpointReader

# Processes that fork must not share the tokenizer's threads.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
VOCABULARY = 260
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256}


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def openling_command(*words: object) -> Result:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as exited:  # argparse
            code = int(exited.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def byte_tokenizer(folder: Path, *, vocabulary: int = VOCABULARY, reverse: bool = False) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)[: vocabulary - 1]
    ids = {letter: i for i, letter in enumerate(letters)} | {"<eos>": len(letters)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def make_llama(folder: Path, *, layers: int = 4, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """BF16, so that rounding between the stages is part of every comparison."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE, **COMMON | changes))
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@dataclass
class Place:
    """A teacher, two texts and the flags that keep a migration short."""

    teacher: Path
    calibration: Path
    evaluation: Path

    def flags(self, **changes: object) -> list[str]:
        fields = {
            "--text": self.calibration,
            "--eval-text": self.evaluation,
            "--tokens": 512,
            "--text.sequence_length": 64,
            "--text.calibration_tokens": 512,
            "--text.evaluation_tokens": 256,
        }
        for warmup in ("linear_warmup", "mla_warmup"):
            short = {"sequence_length": 32, "batch_size": 4, "checkpoint_steps": 2, "warmup_steps": 1}
            fields |= {f"--{warmup}.train.{name}": value for name, value in short.items()}
        fields |= {f"--{name}": value for name, value in changes.items()}
        return [str(word) for pair in fields.items() for word in pair]

    def migrate(self, out: Path, *words: object, model: Path | None = None, **changes: object) -> Result:
        return openling_command("migrate", model or self.teacher, out, *words, *self.flags(**changes))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    # Real sentences with enough letters to learn from; what they say does not matter here.
    (folder / "cal.txt").write_text(" ".join((contextlib.__doc__ or "", str(shutil.__doc__), str(json.__doc__))) * 2)
    (folder / "eval.txt").write_text((subprocess.__doc__ or "")[:2000])
    return Place(make_llama(folder / "teacher"), folder / "cal.txt", folder / "eval.txt")


class Unmeasured:
    """Stands in for `Measurer` where only the weights matter."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def stage(self, student: object) -> dict[str, Any]:
        return {"domains": {}, "layers": [], "needle": [], "samples": []}

    def line(self, stage: dict[str, Any]) -> str:
        return f"done {stage['name']}"


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """No measurements and no page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Measurer", Unmeasured)
        patch.setattr("openling.report.build", lambda folder: folder / "report.html")
        patch.setattr("openling.report.summary_table", lambda report: "")
        yield


@pytest.fixture
def quick() -> Iterator[None]:
    with weights_only():
        yield


@dataclass
class Migrated:
    """A whole run and what was there before it."""

    out: Path
    run: Path
    result: Result
    before: dict[str, str]


@pytest.fixture(scope="session")
def migrated(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Migrated:
    out = tmp_path_factory.mktemp("whole") / "hybrid"
    before = hashes(place.teacher)
    return Migrated(out, out.with_name("hybrid.run"), place.migrate(out), before)


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
    assert "<html" in (migrated.run / "report.html").read_text()


def test_four_single_stages_make_the_same_bits(migrated: Migrated, place: Place, tmp_path: Path, quick: None) -> None:
    model = place.teacher
    for stage in STAGES:
        teacher = ["--teacher", place.teacher] if "warmup" in stage else []
        result = place.migrate(tmp_path / stage, "--stage", stage, *teacher, model=model)
        assert result.code == 0, result.err
        model = tmp_path / stage
    assert weights(model) == weights(migrated.out)
    assert (model / "config.json").read_text() == (migrated.out / "config.json").read_text()


def test_paper_preset_needs_no_teacher_for_a_single_warmup(place: Place, tmp_path: Path, quick: None) -> None:
    assert place.migrate(tmp_path / "a", "--stage", "lightning", "--preset", "paper").code == 0
    result = place.migrate(tmp_path / "b", "--stage", "linear-warmup", "--preset", "paper", model=tmp_path / "a")
    assert result.code == 0, result.err


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


def in_child(action: Callable[[], int]) -> int:
    """`action` in a forked process; its exit code, negative for the signal it died of."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Every step of a run after which the disk or the model is another one.
MOMENTS = (
    (Path, "rename"),
    (Path, "replace"),
    (Path, "mkdir"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (torch.optim.AdamW, "step"),
    (pipeline, "_round"),
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
@pytest.mark.parametrize("share", [(i + 0.5) / 12 for i in range(12)])
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


def refused(result: Result, *parts: str) -> None:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


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
        (["--stages", "mla,lightning"], ["converted already"]),
        (["--stages", "[]"], ["--stages"]),
        (["--preset", "bset"], ["nearest:  best"]),
        (["--stge", "lightning"], ["unknown argument", "nearest:  --stage"]),
        (["--linear_warmup.train.lrr", "1"], ["nearest:  --linear_warmup.train.lr"]),
        (["--tokens", "0"], ["--tokens", "positive"]),
        (["--tokens", "-1"], ["--tokens", "positive"]),
        (["--tokens", "abc"], ["--tokens", "abc"]),
        (["--group-size", "7"], ["divide", "nearest:  4"]),
        (["--layout.kv_lora_rank", "-1"], ["kv_lora_rank", "-1"]),
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
