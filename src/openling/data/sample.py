"""Text that a model writes itself: the domains that it knows, in the shares in which it knows them.

    lanes (the model writes) -> documents in their order -> filters -> parts

A document follows from the seed and its number: neither the batch nor a kill decides what it says, but for rounding. Parts of a
fixed number of documents are written in order to `OUT.run/out`, each whole or not at all, and recorded; the same command goes on
behind the last one. The folder becomes OUT by one rename once there are enough tokens.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from openling.data.defects import self_repetition, structure
from openling.data.sample_prompts import Prompt, Prompts, Written
from openling.data.steps import Filter
from openling.errors import Failure, UserError
from openling.model.capture import CudaCapture, can_capture
from openling.model.config import ModelConfig
from openling.model.lanes import Lanes, Start, lane_bytes
from openling.model.ling import Ling
from openling.weights.export import licence_of
from openling.weights.files import identity
from openling.weights.units import Units
from openling.weights.whole import new_file, write_all, write_json

# Sequences at once unless the user says otherwise, and steps between two looks at what has ended.
LANES = {"cuda": 512, "cpu": 32}
STEPS = {"cuda": 16, "cpu": 1}
# Of the memory that is free on a GPU beside the weights.
GPU_SHARE = 0.8
# Documents of a part.
FEWEST, MOST = 64, 1024
SAY_SECONDS = 10.0
OPEN_FENCE = "a code block is left open"


@dataclass(frozen=True)
class SampleConfig:
    """What decides the documents, besides the model. tokens: at least so many are kept, and less than a document more."""

    tokens: int
    max_new_tokens: int = 1024
    temperature: float = 1.0
    prompt: Literal["bos", "chat", "both"] = "bos"
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "tokens": (self.tokens >= 1, "1 or more"),
            "max-new-tokens": (self.max_new_tokens >= 2, "2 or more"),
            "temperature": (0 < self.temperature < float("inf"), "above 0; 1 is the model's own distribution"),
            "prompt": (self.prompt in ("bos", "chat", "both"), "bos, chat or both"),
            "seed": (0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        }
        for name, (ok, expected) in allowed.items():
            if not ok:
                value = getattr(self, name.replace("-", "_"))
                raise UserError("this setting of sampling has no meaning", where=f"--{name}", value=value, expected=expected)

    @property
    def part(self) -> int:
        """Documents of a part."""
        return min(MOST, max(FEWEST, -(-self.tokens // self.max_new_tokens)))


@dataclass(frozen=True)
class Job:
    """A folder to sample from, where to, and how; model_config and tokenizer are the folder's."""

    model: Path
    out: Path
    config: SampleConfig
    model_config: ModelConfig
    tokenizer: Any
    batch: int | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def run(self) -> Path:
        """Where plan, journal and unfinished parts are."""
        return self.out.with_name(self.out.name + ".run")


def sample(job: Job, load: Callable[[], Ling]) -> dict[str, Any]:
    """Write the documents, or go on with it; counts of documents, tokens and what was dropped. load: the model, when needed."""
    if job.tokenizer is None:
        raise UserError(
            "the folder has no tokenizer", where=job.model, expected="tokenizer.json", next="copy the teacher's there"
        )
    if job.batch is not None and job.batch < 1:
        raise UserError("a batch has sequences", where="--batch", value=job.batch, expected="1 or more")
    prompts = _prompts(job)
    plan = _plan(job)
    if job.out.exists():
        _compare(job, plan, "there is something else at OUT already")
        job.say(f"{job.out} is finished")
        return _total(Units(job.run))
    job.run.mkdir(parents=True, exist_ok=True)
    units = Units(job.run)
    with units.claim("sample") as mine:
        if not mine:
            raise UserError("another process is sampling to this folder", where=job.run, next="wait for it, or name another OUT")
        if (job.run / "plan.json").exists():
            _compare(job, plan, "the folder holds other samples that are not finished")
        (job.run / "out").mkdir(exist_ok=True)
        write_json(job.run / "plan.json", plan)
        parts = Parts(job, prompts, units)
        if not parts.full:
            _write(job, prompts, parts, load())
        _finish(job, parts)
    return _total(units)


def _prompts(job: Job) -> Prompts:
    prompts = Prompts(job.tokenizer, job.model_config, job.config.prompt, job.config.max_new_tokens)
    trained = job.model_config.max_position_embeddings
    if prompts.room > trained:
        raise UserError(
            "the model was not trained for documents of this length",
            where="--max-new-tokens",
            value=f"{prompts.room} tokens with the prompt",
            expected=f"at most {trained} (max_position_embeddings)",
        )
    return prompts


def _plan(job: Job) -> dict[str, Any]:
    """What the documents follow from, as JSON."""
    files = [job.model / "config.json", job.model / "tokenizer.json", *sorted(job.model.glob("*.safetensors"))]
    about = {path.name: identity(path)["samples"] for path in files if path.exists()}
    plan = {"config": asdict(job.config), "part": job.config.part, "model": job.model.absolute().name, "files": about}
    return dict(json.loads(json.dumps(plan)))


def _compare(job: Job, plan: dict[str, Any], what: str) -> None:
    path = job.run / "plan.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    wrong = [f"{k}.{name}" for k in ("config", "files") for name, v in plan[k].items() if old.get(k, {}).get(name) != v]
    if wrong or old["model"] != plan["model"]:
        raise UserError(
            what,
            where=job.out if job.out.exists() else job.run,
            value=wrong[0] if wrong else "model",
            expected="the same model and settings",
            next=f"name another OUT, or remove {job.out} and {job.run}",
        )


def _finish(job: Job, parts: Parts) -> None:
    """Put OUT in place, without drafts of killed writers."""
    names = {part_name(i) for i in range(parts.number)}
    for file in (job.run / "out").iterdir():
        if file.name not in names:
            file.unlink()
    (job.run / "out").rename(job.out)


def part_name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05d}.jsonl"


def _total(units: Units) -> dict[str, Any]:
    """The sums over all parts."""
    total: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for path in units.done.glob("part-*.json"):
        result = json.loads(path.read_text())
        dropped.update(result.pop("dropped"))
        total.update(result)
    return {**total, "dropped": dict(dropped)}


# ---------------------------------------------------------------------------------------------------------------------
# Documents to parts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """What the part that is next holds so far."""

    lines: list[str] = field(default_factory=list)
    tokens: int = 0
    drawn: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Parts:
    """Takes documents in any order of their numbers, writes them in it, and knows when there are enough tokens."""

    def __init__(self, job: Job, prompts: Prompts, units: Units) -> None:
        self.job, self.prompts, self.units, self.config = job, prompts, units, job.config
        self.source = f"{job.model.absolute().name} samples"
        self.licence = licence_of(job.model) or "as the model"
        self._filters: tuple[Filter, ...] = (self_repetition(), structure())
        self._waiting: dict[int, tuple[str | None, int, str | None]] = {}
        self._part = _Part()
        self.number = self.tokens = ended = 0
        while (done := self._recorded(self.number)) is not None:
            self.number, self.tokens = self.number + 1, self.tokens + done["tokens"]
            ended += done["drawn"]
        self._at = self._next = self.number * self.config.part
        # Of all that have ended: how many there are and what they brought.
        self._ended, self.brought = ended, self.tokens
        self.full = self.tokens >= self.config.tokens

    def _recorded(self, number: int) -> dict[str, Any] | None:
        """What is recorded of a part that is there; a part whose record was not written any more is not done."""
        there = (self.job.run / "out" / part_name(number)).exists()
        return self.units.result(f"part-{number:05d}") if there else None

    def next(self, running: int) -> int | None:
        """The number of a document to begin; None where those that are running are likely to be enough."""
        mean = self.brought / self._ended if self._ended else self.config.max_new_tokens / 2
        if running and self.brought + running * mean >= self.config.tokens:
            return None
        self._next += 1
        return self._next - 1

    def take(self, written: Written) -> None:
        """A document has ended."""
        text = self.prompts.text(written)
        fault = written.fault or self._fault(text, written.cut)
        self._ended, self.brought = self._ended + 1, self.brought + (0 if fault else len(written.ids))
        line = None if fault else self._line(written.prompt, text)
        self._waiting[written.prompt.number] = line, len(written.ids), fault
        while not self.full and self._at in self._waiting:
            self._add(*self._waiting.pop(self._at))

    def _fault(self, text: str, cut: bool) -> str | None:
        """Why a text is dropped. One that was cut off may leave a code block open."""
        if not text.strip():
            return "nothing in it"
        found = (f.defect(text) for f in self._filters)
        return next((why for why in found if why is not None and not (cut and why == OPEN_FENCE)), None)

    def _line(self, prompt: Prompt, text: str) -> str:
        record = {"id": f"{prompt.kind}/{prompt.number}", "text": text, "source": self.source, "license": self.licence}
        return json.dumps(record, ensure_ascii=False) + "\n"

    def _add(self, line: str | None, tokens: int, fault: str | None) -> None:
        """The next document in order."""
        part, self._at = self._part, self._at + 1
        part.drawn += 1
        if line is None:
            part.dropped[str(fault)] += 1
        else:
            part.lines.append(line)
            part.tokens += tokens
        self.full = self.tokens + part.tokens >= self.config.tokens
        if self.full or part.drawn == self.config.part:
            self._close(part)

    def _close(self, part: _Part) -> None:
        """Write a part, then record it."""
        if not part.lines:
            raise Failure(
                "nothing that the model writes is worth keeping",
                where=self.job.model,
                value=", ".join(f"{count} x {why}" for why, count in part.dropped.most_common()),
                expected="at least one sound document in a part",
            )
        with new_file(self.job.run / "out" / part_name(self.number)) as handle:
            write_all(handle, memoryview("".join(part.lines).encode()))
        counts = {"documents": len(part.lines), "tokens": part.tokens, "drawn": part.drawn, "dropped": dict(part.dropped)}
        self.units.record(f"part-{self.number:05d}", counts)
        self.number, self.tokens, self._part = self.number + 1, self.tokens + part.tokens, _Part()


# ---------------------------------------------------------------------------------------------------------------------
# The model writes
# ---------------------------------------------------------------------------------------------------------------------


def _write(job: Job, prompts: Prompts, parts: Parts, model: Ling) -> None:
    """Let the model write until there is enough; texts are looked at while the device computes the next steps."""
    lanes, steps = _lanes(job, prompts, model), STEPS[_kind(model)]
    running: dict[int, Prompt] = {}
    again: list[Start] = []
    over: list[Written] = []
    progress = _Progress(job, parts)
    while not parts.full:
        lanes.start([*again, *_begin(job, lanes, running, prompts, parts)])
        made = len(running) * steps
        if running:
            lanes.run(steps)
        for document in over:
            parts.take(document)
        again, over = [], []
        for ended in lanes.ended():
            prompt = running.pop(ended.lane)
            answer = prompts.answered(prompt, ended.tokens)
            if answer is None:
                over.append(prompts.written(prompt, ended.tokens))
            else:
                running[ended.lane] = answer
                again.append(Start(ended.lane, len(ended.tokens) - 1, answer.given, answer.limit))
        progress.tell(made, len(running))


def _begin(job: Job, lanes: Lanes, running: dict[int, Prompt], prompts: Prompts, parts: Parts) -> list[Start]:
    """New documents for the lanes that have none."""
    starts = []
    for lane in (lane for lane in lanes.free if lane not in running):
        number = parts.next(len(running))
        if number is None:
            break
        running[lane] = prompt = prompts.make(number)
        uniform = np.random.default_rng([job.config.seed, number]).random(prompts.room)
        starts.append(Start(lane, 0, prompt.given, prompt.limit, uniform))
    return starts


def _kind(model: Ling) -> str:
    return "cuda" if model.lm_head.weight.is_cuda else "cpu"


def _lanes(job: Job, prompts: Prompts, model: Ling) -> Lanes:
    count = job.batch or LANES[_kind(model)]
    if model.lm_head.weight.is_cuda:
        free, _ = torch.cuda.mem_get_info(model.lm_head.weight.device)
        most = int(GPU_SHARE * free) // lane_bytes(model, prompts.room)
        if most < (job.batch or 1):
            raise UserError("the batch does not fit the GPU's memory", where="--batch", value=count, expected=f"at most {most}")
        count = min(count, most)
    capture = CudaCapture() if can_capture(model) else None
    temperature = job.config.temperature
    return Lanes(model, count=count, room=prompts.room, temperature=temperature, stops=prompts.stops, capture=capture)


class _Progress:
    """A line every few seconds."""

    def __init__(self, job: Job, parts: Parts) -> None:
        self.job, self.parts = job, parts
        self.said, self.made = time.monotonic(), 0

    def tell(self, made: int, running: int) -> None:
        """Count tokens, and say how far it is if it is time."""
        self.made += made
        now = time.monotonic()
        if now - self.said < SAY_SECONDS:
            return
        kept, wanted, rate = self.parts.brought, self.job.config.tokens, self.made / (now - self.said)
        self.said, self.made = now, 0
        self.job.say(f"{kept:,} of {wanted:,} tokens in whole documents; {rate:,.0f} per second in {running} at once")
