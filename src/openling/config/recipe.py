"""A recipe: a model, corpora, and stages of training in order. TOML; any field can be set from the command line. No torch here.

[model] where training starts    [corpora.NAME] text to tokenise or a built corpus    [[sources]] what stages may read
[train] defaults of every stage  [[stages]] name, mixture, length of the run, and whatever differs from [train]
[parallel] how many ranks share what, and recomputing; [stages.parallel] inside of a stage, what differs there
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from openling.config.data import MIXTURES, MixtureConfig, SourceConfig, read_mixture
from openling.config.presets import PRESETS
from openling.config.section import Section, nearest_setting, refusal, wrong
from openling.config.train import TrainConfig
from openling.errors import UserError, nearest

# Names become folders: none that is hidden, or that means the folder itself or the one above.
NAME = r"^[\w-][\w.-]*$"


class StartConfig(Section):
    """The first weights: a checkpoint folder, or a shape with random weights. With both the shape serves estimates alone."""

    folder: str | None = Field(
        None, min_length=1, description="checkpoint folder to continue from, as `openling migrate` writes it"
    )
    preset: str | None = Field(None, description="shape by name")
    overrides: dict[str, Any] = Field({}, description="keys of config.json that replace the preset's")
    tokenizer: str | None = Field(None, min_length=1, description="folder with a tokenizer, or `bytes`; null: that of `folder`")
    teacher: str | None = Field(None, min_length=1, description="checkpoint folder that `kl` and `align` of the stages follow")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the checkpoints that stages write")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.folder is None and (self.preset is None or self.tokenizer is None):
            raise ValueError("give a folder, or a preset and a tokenizer")
        if self.preset is not None and self.preset not in PRESETS:
            close = nearest(self.preset, PRESETS)
            raise ValueError(f"unknown preset {self.preset!r}" + (f", did you mean {close!r}?" if close else ""))
        known = {key for preset in PRESETS.values() for key in preset()} if self.overrides else set()
        if unknown := next((key for key in self.overrides if key not in known), None):
            close = nearest(unknown, known)
            raise ValueError(f"unknown key {unknown!r} in overrides" + (f", did you mean {close!r}?" if close else ""))
        return self


class CorpusConfig(Section):
    """A corpus that `openling data build` wrote, or what the run is to build for itself."""

    path: str | None = Field(None, description="folder of a built corpus")
    build: tuple[str, ...] = Field((), description="[NAME=]SOURCE words, as for `openling data build`")
    filters: tuple[str, ...] = Field((), description="steps, as for `openling data build`")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.path is None) == (not self.build):
            raise ValueError("give a path or what to build")
        return self


class YarnConfig(Section):
    """RoPE scaled by YaRN, written into every checkpoint of the stage."""

    factor: float = Field(gt=1)
    original: int = Field(gt=0, description="context that the unscaled frequencies were trained for")


class MergeConfig(Section):
    """WSM: the stage's checkpoint is a weighted mean of its last training checkpoints."""

    last: int = Field(gt=1, description="how many checkpoints")
    weights: str = Field("mean", description="mean, 1-sqrt, linear, cosine, ema:ALPHA")


class ParallelConfig(Section):
    """How many ranks share what, as `openling plan --mesh` has it; for `torchrun`. One rank needs none of it."""

    pipeline: int = Field(1, gt=0, description="ranks that each hold a run of layers; parts of a step are at least as many")
    stages_per_rank: int = Field(1, gt=0, description="runs of layers of a pipeline rank; more than one are interleaved")
    replicate: int = Field(1, gt=0, description="copies of the sharded model, each with other rows")
    shard: int | None = Field(None, gt=0, description="ranks that share weights, each with other rows; null: see rest")
    context: int = Field(1, gt=0, description="ranks that share every row")
    tensor: int = Field(1, gt=0, description="ranks that share every matrix product")
    expert: int = Field(1, gt=0, description="ranks that share the experts; taken from shard x context")
    rest: Literal["shard", "context"] = Field("shard", description="which of the two takes all the ranks that are left")
    recompute: Literal["none", "layer", "selective"] = Field("none", description="what backward computes again to save memory")
    gather: Literal["layer", "accumulate", "step"] = Field(
        "accumulate",
        description="layer: gradients are reduced after every part; accumulate: once a step; step: weights gathered once too",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pipeline > 1 and self.gather != "accumulate":
            what = f'gather = "{self.gather}" and a pipeline do not go together: its stages go by "accumulate"'
            raise wrong(what, 'gather = "accumulate"')
        if self.rest == "context" and self.context > 1:
            raise ValueError(f'rest = "context" chooses context, which is {self.context} here: leave one of them out')
        return self

    def leaving(self, world: int) -> tuple[int, int]:
        """Shard and context ranks of a world; shard is 0 where `parallel.mesh` is to take what is left."""
        if self.rest == "shard":
            return self.shard or 0, self.context
        shard = self.shard or 1
        return shard, max(1, world // (self.pipeline * self.replicate * shard * self.tensor))


class StageConfig(TrainConfig):
    """One stage. `sequence_length` is the mixture's row and is filled in from there."""

    name: str = Field(pattern=NAME)
    mixture: MixtureConfig
    trainable: tuple[str, ...] = Field(("",), description="expressions for parameters that train; all by default")
    rope_theta: float | None = Field(None, gt=0, description="null: as before")
    yarn: YarnConfig | None = Field(None, description="null: as before")
    max_position_embeddings: int | None = Field(None, gt=0, description="null: as before, or the rows where these are longer")
    merge: MergeConfig | None = None
    parallel: ParallelConfig | None = Field(None, description="in a file: what differs from [parallel]; null: nothing")

    @field_validator("max_position_embeddings")
    @classmethod
    def _rows_fit(cls, most: int | None, info: ValidationInfo) -> int | None:
        rows = info.data.get("sequence_length")  # absent where it is wrong itself
        if most is not None and rows is not None and most < rows:
            raise wrong(f"at least {rows}, the length of the stage's rows", rows)
        return most

    def run(self) -> TrainConfig:
        """What the loop needs of it."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})


class RecipeConfig(Section):
    """Everything that one `openling train` does."""

    name: str = Field(pattern=NAME)
    model: StartConfig
    corpora: dict[str, CorpusConfig] = {}
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    parallel: ParallelConfig = ParallelConfig()
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field((), description="who is told every step's metrics")
    seed: int = Field(0, ge=0, lt=2**63, description="of random first weights")

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise wrong("each tracker once", list(dict.fromkeys(trackers)))
        return trackers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        several = self.parallel.stages_per_rank
        if several > 1 and all(self.parallel_of(stage).pipeline == 1 for stage in self.stages):
            what = f"parallel.stages_per_rank = {several} is of a pipeline, and no stage has one"
            raise wrong(what, "parallel.stages_per_rank = 1")
        return self

    def parallel_of(self, stage: StageConfig) -> ParallelConfig:
        """What ranks share in a stage, its own settings over those of the recipe."""
        return stage.parallel or self.parallel

    def corpus_path(self, name: str, run: Path) -> Path:
        """Where a corpus lies: built ones in the run's folder."""
        path = self.corpora[name].path
        return run / "corpora" / name if path is None else Path(path)


def read_recipe(path: Path, changes: Sequence[tuple[str, str]] = ()) -> RecipeConfig:
    """The recipe in a TOML file with (dotted name, text) changes applied; every mistake is a `UserError` that says where."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError("the recipe cannot be read", where=path, value=error.strerror, expected="a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("the recipe is not TOML", where=path, value=error) from error
    for name, text in changes:
        _change(data, name, text)
    return resolve(data, where=path)


def resolve(data: dict[str, Any], *, where: object = None) -> RecipeConfig:
    """A recipe from its tables: defaults of [train] and [[sources]] go into the stages, mixtures get their presets."""
    _known(data, [*RecipeConfig.model_fields, "train", "sources"], where, "")
    _shaped(data, where)
    stage_keys = list(StageConfig.model_fields)
    sections: list[tuple[str, type[BaseModel]]] = [("model", StartConfig), ("parallel", ParallelConfig)]
    for name, section in sections:
        _known(data.get(name, {}), list(section.model_fields), where, name)
    for name, corpus in data.get("corpora", {}).items():
        _known(corpus, list(CorpusConfig.model_fields), where, f"corpora.{name}")
    shared = data.get("train", {})
    _known(shared, [k for k in stage_keys if k not in ("name", "mixture", "parallel")], where, "train")
    sources = data.get("sources", [])
    for i, source in enumerate(sources):
        _known(source, list(SourceConfig.model_fields), where, f"sources.{i}")
        if data.get("corpora") is not None and source.get("corpus") not in data["corpora"]:
            close = nearest(str(source.get("corpus")), data["corpora"])
            expected = ", ".join(data["corpora"])
            raise UserError("no such corpus", where=f"sources.{i}", value=source.get("corpus"), expected=expected, nearest=close)
    tables = [_with_parallel(stage, data.get("parallel", {}), where) for stage in data.get("stages", [])]
    stages = [_stage(stage, shared, sources, stage_keys, where) for stage in tables]
    names = [s.name for s in stages]
    if twice := [name for name in names if names.count(name) > 1]:
        place, listed = f"{where}, stages", ", ".join(names)
        raise UserError(f"two stages are named {twice[0]}", where=place, value=listed, expected="a name each")
    rest = {key: value for key, value in data.items() if key not in ("train", "sources", "stages")}
    try:
        return RecipeConfig(**rest, stages=tuple(stages))
    except ValidationError as error:
        raise _refusal(error, where, "") from error


def _with_parallel(stage: dict[str, Any], shared: dict[str, Any], where: object) -> dict[str, Any]:
    """A stage whose [parallel] is whole: the recipe's where it says nothing else. One without such a table stays as it is."""
    if stage.get("parallel") is None:
        return stage
    place = f"stages.{stage.get('name', 'without a name')}"
    _tables(stage, dict, ("parallel",), where, place)
    _known(stage["parallel"], list(ParallelConfig.model_fields), where, f"{place}.parallel")
    return stage | {"parallel": shared | stage["parallel"]}


def _stage(stage: dict[str, Any], shared: dict[str, Any], sources: list[Any], keys: list[str], where: object) -> StageConfig:
    name = str(stage.get("name", "without a name"))
    place = f"stages.{name}"
    _known(stage, keys, where, place)
    fields = dict(shared) | stage
    if "steps" in stage:
        fields["tokens"] = stage.get("tokens")
    elif "tokens" in stage:
        fields["steps"] = None
    _tables(fields, dict, ("mixture", "ramp", "yarn", "merge"), where, place)
    table = dict(fields.get("mixture") or {})
    _tables(table, dict, ("shares", "temperature", "long"), where, f"{place}.mixture")
    if "sources" not in table:
        table["sources"] = _fitting(sources, table, f"{where}, {place}.mixture")
    mixture = read_mixture(table, where=f"{where}, {place}.mixture")
    if fields.get("sequence_length", mixture.row_length) != mixture.row_length:
        raise UserError(
            "the rows are as long as the mixture's", where=f"{where}, {place}.sequence_length", value=fields["sequence_length"],
            expected=f"{mixture.row_length}, or leave it out",
        )  # fmt: skip
    try:
        return StageConfig(**fields | {"mixture": mixture, "sequence_length": mixture.row_length})
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
        raise _refusal(error, where, "train" if field in shared and field not in stage else place) from error


def _shaped(data: dict[str, Any], where: object) -> None:
    """Tables where tables belong."""
    _tables(data, dict, ("model", "parallel", "corpora", "train"), where)
    _tables(data.get("corpora", {}), dict, data.get("corpora", {}), where, "corpora")
    for name in ("sources", "stages"):
        _tables(data, list, (name,), where)
        for i, entry in enumerate(data.get(name, [])):
            if not isinstance(entry, dict):
                raise _no_table(where, f"{name}.{i}", entry, f"[[{name}]]")


def _tables(table: dict[str, Any], kind: type, names: Iterable[str], where: object, place: str = "") -> None:
    for name in names:
        value = table.get(name)
        if name in table and not isinstance(value, kind) and not (value is None and place):
            dotted = f"{place}.{name}" if place else name
            raise _no_table(where, dotted, value, f"[{dotted}]" if kind is dict else f"[[{dotted}]]")


def _no_table(where: object, dotted: str, value: object, header: str) -> UserError:
    return UserError("this is no table", where=f"{where}, {dotted}", value=value, expected=f"a table, as under {header}")


def _fitting(sources: list[Any], table: dict[str, Any], where: str) -> list[Any]:
    """The recipe's sources that belong to a group of this mixture; a `UserError` where a group has none."""
    shares = table.get("shares") or MIXTURES.get(str(table.get("preset")), {}).get("shares") or {"all": 1.0}
    there = list(dict.fromkeys(str(s.get("group", "all")) for s in sources))
    if there and (unknown := next((group for group in shares if group not in there), None)) is not None:
        close, expected = nearest(unknown, there), f"a group of [[sources]]: {', '.join(there)}"
        raise UserError("no source has this group", where=f"{where}.shares", value=unknown, expected=expected, nearest=close)
    return [s for s in sources if s.get("group", "all") in shares]


def _known(table: dict[str, Any], names: Sequence[str], where: object, place: str) -> None:
    for key in table:
        if key not in names:
            dotted = f"{place}.{key}" if place else key
            close = nearest_setting(key, names)
            shown = None if close is None else f"{place}.{close}" if place else close
            raise UserError("unknown setting", where=where, value=dotted, expected=", ".join(names), nearest=shown)


def _refusal(error: ValidationError, where: object, place: str) -> UserError:
    return refusal(error, lambda name: f"{where}, {'.'.join(filter(None, (place, name))) or 'the recipe'}")


def _change(data: dict[str, Any], name: str, text: str) -> None:
    """Set `section.field`, or `stages.NAME.field`, in a recipe's tables."""
    *parents, last = name.split(".")
    table: Any = data
    done: list[str] = []
    for part in parents:
        if isinstance(table, list):
            names = [str(entry.get("name", i)) for i, entry in enumerate(table)]
            if part not in names:
                at = ".".join(done)
                raise UserError("no such entry", where=at, value=part, expected=", ".join(names), nearest=nearest(part, names))
            table = table[names.index(part)]
        else:
            table = table.setdefault(part, {})
        done.append(part)
        if not isinstance(table, (dict, list)):
            raise UserError("this setting has no parts", where=".".join(done), value=table)
    if isinstance(table, list):
        raise UserError("this is a list", where=".".join(done), value=last, expected=f"{'.'.join(done)}.NAME.FIELD")
    table[last] = _value(text)
    if last in ("steps", "tokens"):  # exactly one of them counts
        table.pop("tokens" if last == "steps" else "steps", None)


def _value(text: str) -> Any:
    """JSON where it parses (numbers, booleans, null, lists), else the word itself."""
    try:
        return json.loads(text)
    except ValueError:  # a number of too many digits, too
        return text
