"""What `report.json` holds. Everything but title and stages may be missing: the page then says `not run`. Losses are in nats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from openling.config.section import refusal
from openling.errors import UserError


class Figures(BaseModel):
    """Numbers of one model, as `openling plan --json` prints them; bytes in BF16, states in FP32."""

    total_params: int
    active_params: int
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    break_even_tokens: int | None = None


class Plan(Figures):
    """The hybrid, and its teacher under `source`."""

    source: Figures | None = None


class Layout(BaseModel):
    """Which layer became what; `said` tells why the groups have their size."""

    group_size: int | None = None
    layer_kinds: list[str] = []
    said: str = ""


class Text(BaseModel):
    """A text that was read, and for what."""

    name: str
    licence: str
    role: str
    tokens: int | None = None
    source: str | None = None


class Agreement(BaseModel):
    """A stage against the teacher on one text."""

    loss: float
    loss_stderr: float
    perplexity: float
    teacher_loss: float
    kl: float
    top1: float
    tokens: int
    gap_stderr: float | None = None

    @property
    def gap(self) -> float:
        """Loss above the teacher's."""
        return self.loss - self.teacher_loss


class LayerError(BaseModel):
    """Relative squared error of one layer's attention output."""

    layer: int
    kind: str
    local: float
    propagated: float


class Share(BaseModel):
    """Share of `n` needles found."""

    exact: float
    n: int

    @property
    def found(self) -> int:
        """Needles found."""
        return round(self.exact * self.n)


class DepthRecall(Share):
    """With the fact at one depth, a share of the text before it."""

    depth: float


class Recall(Share):
    """At one length, over all depths and at each."""

    length: int
    depths: list[DepthRecall] = []


class RouterDrift(BaseModel):
    """One layer's router against the teacher's: share of tokens whose set of experts changed, share of choices kept, KL."""

    layer: int
    changed: float
    kept: float
    kl: float


class Spectrum(BaseModel):
    """Share of energy that a factor of an MLA layer would keep at each of `ranks`; `rank` is the chosen one."""

    layer: int
    part: str
    rank: int
    ranks: list[int]
    energy: list[float]

    @property
    def kept(self) -> float:
        """Share at the chosen rank."""
        return next((e for r, e in zip(self.ranks, self.energy, strict=True) if r >= self.rank), 1.0)


class HeadSpans(BaseModel):
    """Half-lives of a Lightning layer's heads, and the look-back of the teacher's heads in their places; tokens."""

    layer: int
    half_life: list[float]
    look_back: list[float]


class Moved(BaseModel):
    """Bytes of weights that a stage read, wrote, and of those written, changed."""

    read: int
    written: int
    changed: int


class Spent(BaseModel):
    """Seconds of the stage's own work, of measuring, of writing."""

    work: float
    measure: float
    write: float


class Sample(BaseModel):
    """A prompt and its greedy continuation."""

    prompt: str
    completion: str


class Approximation(BaseModel):
    """An approximate step and its measured error."""

    step: str
    layer: int | None = None
    measure: str
    value: float


class Verdict(BaseModel):
    """One gate after one stage; `standard` is the preset's limit, `why` what the value was computed from, or what was missing."""

    gate: str
    outcome: str
    unit: str = ""
    value: float | None = None
    limit: float | None = None
    standard: float | None = None
    text: str | None = None
    why: str = ""


class Stage(BaseModel):
    """The model as one stage left it. `metrics`: its training log, relative to the run folder.

    needle: one fact in each text. needle_among: `needle_keys` facts, one of which is asked for.
    """

    name: str
    seconds: float | None = None
    tokens: int | None = None
    domains: dict[str, Agreement] = {}
    bytes: Moved | None = None
    spent: Spent | None = None
    layers: list[LayerError] = []
    routers: list[RouterDrift] = []
    spectra: list[Spectrum] = []
    heads: list[HeadSpans] = []
    needle_left_out: list[int] = []
    needle: list[Recall] = []
    needle_keys: int = 1
    needle_among: list[Recall] = []
    samples: list[Sample] = []
    approximations: list[Approximation] = []
    gates: list[Verdict] = []
    metrics: str | None = None
    notes: list[str] = []


class DecodeRow(BaseModel):
    """Decoding one sequence at one context."""

    context: int
    cache_bytes: int
    formula_bytes: int
    ms_per_token: float
    peak_bytes: int | None = None


class Decode(BaseModel):
    """Decoding of teacher and hybrid."""

    teacher: list[DecodeRow] = []
    hybrid: list[DecodeRow] = []


class Preset(BaseModel):
    """The loss of one preset after one stage on one text."""

    preset: str
    stage: str
    domain: str
    loss: float
    gap: float


class Shipped(BaseModel):
    """A hybrid made elsewhere, measured beside this run. tokens, hardware: what it was trained on; `about`: more of its card."""

    tokens: int | None = None
    hardware: str | None = None
    about: dict[str, str] = {}
    stage: Stage
    decode: list[DecodeRow] = []


class Report(BaseModel):
    """The whole file."""

    title: Annotated[str, Field(min_length=1)]
    command: str | None = None
    date: str | None = None
    commit: str | None = None
    seconds: float | None = None
    environment: dict[str, str] = {}
    settings: dict[str, Any] = {}
    plan: Plan | None = None
    layout: Layout = Layout()
    texts: list[Text] = []
    stages: list[Stage]
    decode: Decode = Decode()
    presets: list[Preset] = []
    shipped: Shipped | None = None

    @property
    def converted(self) -> list[Stage]:
        """The stages after the teacher."""
        return [stage for stage in self.stages if stage.name != "teacher"]

    @property
    def last_measured(self) -> Stage | None:
        """The last stage whose loss was measured."""
        return next((stage for stage in reversed(self.converted) if stage.domains), None)

    @property
    def warm_up_tokens(self) -> int:
        """Training tokens of all warm-ups."""
        return sum(stage.tokens or 0 for stage in self.stages if stage.name.endswith("warmup"))

    @property
    def layer_kinds(self) -> list[str]:
        """Kind of each layer in the end: as the layout says, else as the last measured layers were."""
        measured = next((stage.layers for stage in reversed(self.converted) if stage.layers), [])
        return self.layout.layer_kinds or [row.kind for row in measured]

    @property
    def domains(self) -> list[str]:
        """Names of all texts that were scored, in the order they appear."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.domains))


def parse(data: Any, *, where: object = None) -> Report:
    """A checked report; UserError names the first field that is wrong."""
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        places, what = (str(where),) if where else (), "the report cannot be read"
        raise refusal(error, lambda name: ", ".join((*places, name or "the file")), what, suggest=False) from error


def read_report(folder: Path) -> Report:
    """The `report.json` of a run folder."""
    path = folder / "report.json"
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), where=path)
    except OSError as error:
        raise UserError(
            "this folder holds no report", where=path, value=error.strerror, expected="report.json of a run"
        ) from error
    except ValueError as error:
        raise UserError("this file is not JSON", where=path, value=error, expected="report.json of a run") from error


def read_metrics(folder: Path, name: str) -> list[dict[str, Any]] | None:
    """Rows of a training log; None where it is absent. A torn last line, left by a kill, is passed over."""
    path = folder / name
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
