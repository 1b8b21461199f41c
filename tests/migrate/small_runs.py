"""Tiny teachers and short migrations of them through the command line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from openling.cli import main
from openling.migrate import pipeline

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


@dataclass
class Migrated:
    """A whole run and what was there before it."""

    out: Path
    run: Path
    result: Result
    before: dict[str, str]


def refused(result: Result, *parts: str) -> None:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


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
