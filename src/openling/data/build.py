"""Build a corpus: sources become units, units become shards, in any number of processes, killed and continued at will.

`OUT.run` holds the plan, the journal (`weights/units.py`) and the shards until all are there; then `index.json` is written
and the folder becomes OUT by one rename. A unit's shard depends on the plan alone: who built it, when, and how often the
build was killed before leave no trace in OUT.

    read -> filters -> deduplication -> synthesis -> shuffle within the unit -> tokens -> shard

Deduplication sees all units: a first pass keeps only hashes and signatures of what the filters leave (`dedup.py`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from openling.data.dataset import Dataset
from openling.data.dedup import copies, load_arrays, parse_dedup, save_arrays, signatures
from openling.data.defects import FILTERS
from openling.data.order import shuffled, stable_key
from openling.data.shards import INDEX, read_index, write_index, write_shard
from openling.data.sources import UNIT_BYTES, BadInput, Fields, Record, Seen, Source, Unit, absent_columns, plan_units, read_unit
from openling.data.steps import counted, make_step
from openling.data.synthesis import RECIPES
from openling.data.tokens import Encoder, TokenizerInfo, describe
from openling.errors import Failure, UserError
from openling.weights.io import write_error
from openling.weights.units import Units
from openling.weights.whole import NO_SPACE, new_file, write_all, write_json

# Below this much text a second process starts more slowly than the first one works.
WORTH_A_PROCESS = 8 << 20
# Unreadable lines and files that the report names; the rest are only counted.
NAMED_BAD = 20
# Licences or languages that a source is told with; the rest are only counted.
MOST_LABELS = 12


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of a corpus, besides its sources' content and the tokenizer."""

    sources: tuple[Source, ...]
    fields: Fields = field(default_factory=Fields)
    filters: tuple[str, ...] = ()
    dedup: str = "none"
    synthesis: tuple[str, ...] = ()
    skip_bad: bool = False
    seed: int = 0
    unit_bytes: int = UNIT_BYTES
    control_tokens: bool = False


def build(
    config: BuildConfig,
    out: Path,
    tokenizer: Any,
    *,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Build the corpus at `out` with a transformers tokenizer, or go on with it; returns the index.

    workers: processes; by default one per core where the text is long enough to pay.
    """
    info, tokenizer_json = describe(tokenizer)
    run = out.with_name(out.name + ".run")
    plan = _plan(config, info)
    if out.exists() and not (out / INDEX).exists():
        raise UserError(
            "there is something else already, which is no corpus", where=out, expected="a new folder, named behind the sources"
        )
    try:
        if out.exists():
            return _mend(out, run, plan, tokenizer_json, say)
        _enter(run, plan, tokenizer_json)
        jobs = Jobs(run, _workers(workers, plan), say)
        names = [unit["name"] for unit in plan["units"]]
        if config.dedup != "none":
            jobs.do("scan", names)
            _resolve(run, names, config.dedup)
        jobs.do("tokenise", names)
        return _finish(out, run, plan, say)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        again = "free some space; the same command goes on with the build"
        raise write_error(error, Path(error.filename or run), kept="units that are done are kept", resume=again) from error


def _plan(config: BuildConfig, info: TokenizerInfo) -> dict[str, Any]:
    names = [source.name for source in config.sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError("two sources have the same name", value=twice, expected="different names", next="NAME=PATH")
    for spec in config.filters:
        make_step(spec, FILTERS)
    for spec in config.synthesis:
        make_step(spec, RECIPES)
    parse_dedup(config.dedup)
    units = plan_units(config.sources, unit_bytes=config.unit_bytes)
    files = sorted({file for unit in units if unit.kind != "builtin" for file in unit.files})
    about = {file: _identity(file) for file in files}
    plan = {"config": asdict(config), "tokenizer": info.as_json(), "files": about, "units": [u.as_json() for u in units]}
    return dict(json.loads(json.dumps(plan)))


def _identity(file: str) -> list[int]:
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns]


def _difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str | None:
    """The first setting that differs."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, f"{where}{key} "):
                return found
        elif a != b:
            return f"{where}{key}"
    return None


def _compare(run: Path, plan: dict[str, Any], what: str) -> None:
    old = json.loads((run / "plan.json").read_text())
    if different := _difference(old, plan):
        raise UserError(
            what,
            where=run / "plan.json",
            value=different,
            expected="the same sources, settings and tokenizer",
            next=f"build into another folder, or remove {run}",
        )


def _enter(run: Path, plan: dict[str, Any], tokenizer_json: str) -> None:
    """Write the plan of a new run; compare with that of one that goes on."""
    run.mkdir(parents=True, exist_ok=True)
    if (run / "plan.json").exists():
        _compare(run, plan, "the folder holds another build that is not finished")
        if not (run / "tokenizer.json").exists():  # it was finished, and somebody removed the corpus
            _lay_out(run, tokenizer_json)
        return
    _lay_out(run, tokenizer_json)
    write_json(run / "plan.json", plan)


def _lay_out(run: Path, tokenizer_json: str) -> None:
    """The folders that work happens in, and the tokenizer for worker processes."""
    for name in ("out", "scan"):
        (run / name).mkdir(exist_ok=True)
    with new_file(run / "tokenizer.json") as handle:
        write_all(handle, memoryview(tokenizer_json.encode()))


def _tidy(run: Path) -> None:
    """Leave what a damaged shard could be built again from: plan, results, which documents were copies."""
    for path in (run / "scan").glob("*.npz"):
        if not path.name.endswith(".gone.npz"):
            path.unlink()
    for name in ("claims", "out"):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / "tokenizer.json").unlink(missing_ok=True)


def _mend(out: Path, run: Path, plan: dict[str, Any], tokenizer_json: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Read every byte of a finished corpus and build damaged shards again; their bytes must come out as they were."""
    index = read_index(out)
    if not (run / "plan.json").exists():
        raise UserError("there is a corpus already", where=out, expected="a new folder")
    _compare(run, plan, "there is another corpus already")
    say(f"{out} is finished: checking every byte")
    damaged = {name for name, problems in Dataset(out, check=False).verify() if problems}
    units = Units(run)
    for line in index["shards"]:
        if line["file"] not in damaged:
            continue
        say(f"{line['file']} is damaged: building it again")
        _lay_out(run, tokenizer_json)
        unit = line["file"].removesuffix(".safetensors")
        (units.done / f"tokenise-{unit}.json").unlink(missing_ok=True)
        work(run, "tokenise", unit)
        again = (units.result(f"tokenise-{unit}") or {}).get("shard") or {}
        if again.get("sha256") != line["sha256"]:
            raise Failure("the shard comes out differently now", where=line["file"], next="build into a new folder")
        (run / "out" / line["file"]).replace(out / line["file"])
    _tidy(run)
    return index


def _workers(asked: int | None, plan: dict[str, Any]) -> int:
    cores = len(os.sched_getaffinity(0))
    size = sum(unit["bytes"] for unit in plan["units"])
    most = min(len(plan["units"]), asked or cores)
    return most if asked or size >= WORTH_A_PROCESS else 1


# ---------------------------------------------------------------------------------------------------------------------
# Units
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """The plan as a worker reads it, once per process."""

    run: Path
    config: BuildConfig
    info: TokenizerInfo
    units: dict[str, Unit]
    files: dict[str, list[int]]
    encoder: Encoder


@lru_cache(maxsize=1)
def _job(run: Path, changed: int) -> _Job:
    """The job that a run's plan describes; changed: when the plan was written, ns, since another may follow in the same place."""
    plan = json.loads((run / "plan.json").read_text())
    settings = plan["config"]
    settings["sources"] = tuple(Source(**s) for s in settings["sources"])
    settings["fields"] = Fields(**settings["fields"])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    config = BuildConfig(**values)
    info = TokenizerInfo(**plan["tokenizer"])
    units = {u["name"]: Unit(**u | {"files": tuple(u["files"])}) for u in plan["units"]}
    encoder = Encoder((run / "tokenizer.json").read_text(), info, control_tokens=config.control_tokens)
    return _Job(run, config, info, units, plan["files"], encoder)


class _Account:
    """What a unit's reading found, for the report."""

    def __init__(self, config: BuildConfig) -> None:
        self.skip_bad = config.skip_bad
        self.bad = 0
        self.named: list[str] = []
        self.seen = Seen()
        self.steps: dict[str, dict[str, int]] = {}

    def refuse(self, error: BadInput) -> None:
        """Raise, or count where the user asked for that."""
        if not self.skip_bad:
            raise error
        self.bad += 1
        if len(self.named) < NAMED_BAD:
            self.named.append(f"{error.parts['where']}: {error.what}")

    def as_json(self) -> dict[str, Any]:
        """For the journal."""
        seen = {"empty": self.seen.empty, "columns": sorted(self.seen.columns)}
        return {"bad": self.bad, "named": self.named, "steps": self.steps} | seen


def _filtered(job: _Job, unit: Unit, account: _Account) -> Iterator[Record]:
    """The records that the filters leave."""
    records = read_unit(unit, job.config.sources[unit.source], job.config.fields, account.refuse, account.seen)
    for spec in job.config.filters:
        records = counted(make_step(spec, FILTERS), records, account.steps.setdefault(spec, {}))
    return records


def _check_files(job: _Job, unit: Unit) -> None:
    """A Failure where a file is no longer what the plan saw."""
    for name in unit.files if unit.kind != "builtin" else ():
        try:
            now = _identity(name)
        except FileNotFoundError:
            now = []
        if now != job.files[name]:
            raise Failure(
                "a source has changed since the build began",
                where=name,
                value=f"{now[0]} bytes" if now else "gone",
                expected=f"{job.files[name][0]} bytes, unchanged",
                next=f"restore it and build again, or remove {job.run} to begin anew",
            )


def _scan(job: _Job, unit: Unit) -> dict[str, Any]:
    """Keep hashes and signatures of what the filters leave of a unit."""
    _check_files(job, unit)
    found = signatures(_filtered(job, unit, _Account(job.config)), parse_dedup(job.config.dedup)[0])
    save_arrays(job.run / "scan" / f"{unit.name}.npz", found)
    return {}


def _resolve(run: Path, names: Sequence[str], dedup: str) -> None:
    """Decide which documents of all units are copies; whoever comes second finds it done."""
    units = Units(run)
    while units.result("resolve") is None:
        with units.claim("resolve") as mine:
            if mine:
                parts = [load_arrays(run / "scan" / f"{name}.npz") for name in names]
                gone, counts = copies(parts, *parse_dedup(dedup))
                place = 0
                for name, part in zip(names, parts, strict=True):
                    size = len(part["hash"])
                    save_arrays(run / "scan" / f"{name}.gone.npz", {"gone": gone[place : place + size]})
                    place += size
                units.record("resolve", counts)
        time.sleep(0 if mine else 0.2)


def _without_copies(job: _Job, unit: Unit, records: list[Record]) -> list[Record]:
    gone = load_arrays(job.run / "scan" / f"{unit.name}.gone.npz")["gone"].tolist()
    if len(gone) != len(records):
        raise Failure(
            "a source or a step gave other documents than before",
            where=f"unit {unit.name}",
            value=f"{len(records)} documents",
            expected=f"{len(gone)}",
            next="steps must depend on their documents alone",
        )
    return [record for record, copy in zip(records, gone, strict=True) if not copy]


def _tokenise(job: _Job, unit: Unit) -> dict[str, Any]:
    """Make a unit's shard."""
    account = _Account(job.config)
    _check_files(job, unit)
    records = list(_filtered(job, unit, account))
    _check_files(job, unit)
    if job.config.dedup != "none":
        records = _without_copies(job, unit, records)
    stream = iter(records)
    for spec in job.config.synthesis:
        stream = counted(make_step(spec, RECIPES), stream, account.steps.setdefault(spec, {}))
    records = list(stream)
    line = None
    if records:
        order = shuffled(np.arange(len(records)), len(records), stable_key(job.config.seed, unit.name))
        records = [records[i] for i in order]
        documents = list(zip(records, job.encoder.encode(r.text for r in records), strict=True))
        line = write_shard(job.run / "out" / f"{unit.name}.safetensors", documents, job.info)
        line["source"] = job.config.sources[unit.source].name
    return {"shard": line} | account.as_json()


TASKS: dict[str, Callable[[_Job, Unit], dict[str, Any]]] = {"scan": _scan, "tokenise": _tokenise}


def work(run: Path, task: str, name: str) -> bool:
    """Do one unit's task unless it is done or somebody else is at it; runs in a worker process."""
    job = _job(run, (run / "plan.json").stat().st_mtime_ns)
    units = Units(run)
    with units.claim(f"{task}-{name}") as mine:
        if mine:
            began = time.monotonic()
            result = TASKS[task](job, job.units[name])
            units.record(f"{task}-{name}", result | {"seconds": round(time.monotonic() - began, 3)})
    return mine


def _start_worker() -> None:
    """In a worker: leave interrupts to the parent, and end when it ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Jobs:
    """Units of a task shared among processes here, and with whoever else works in the same run folder."""

    def __init__(self, run: Path, workers: int, say: Callable[[str], None]) -> None:
        self.run, self.workers, self.say = run, workers, say
        self.units = Units(run)

    def do(self, task: str, names: Sequence[str]) -> None:
        """Until every unit is done."""
        self._forget_lost(task, names)
        said = time.monotonic()
        while left := [name for name in names if self.units.result(f"{task}-{name}") is None]:
            before = len(left)
            for number, _ in enumerate(self._each(task, left), 1):
                if time.monotonic() - said > 5:
                    said = time.monotonic()
                    self.say(f"{task}: {len(names) - before + number} of {len(names)} units")
            if before == sum(self.units.result(f"{task}-{name}") is None for name in left):
                time.sleep(1)  # others are at work on what is left

    def _each(self, task: str, names: Sequence[str]) -> Iterator[bool]:
        if self.workers == 1:
            yield from (work(self.run, task, name) for name in names)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker) as pool:
            futures = [pool.submit(work, self.run, task, name) for name in names]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise Failure(
                    "a worker process died: killed, or out of memory",
                    where=self.run,
                    value=f"{self.workers} workers",
                    next="the same command continues; --workers N with a smaller N needs less memory",
                ) from error
            except BaseException:  # a unit that is cut off is simply not done
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _forget_lost(self, task: str, names: Sequence[str]) -> None:
        """A unit whose shard is not there as recorded (a machine lost power) is not done."""
        for name in names:
            if task == "scan" and not (self.run / "scan" / f"{name}.npz").exists():
                (self.units.done / f"{task}-{name}.json").unlink(missing_ok=True)
            line = (self.units.result(f"{task}-{name}") or {}).get("shard")
            if line is not None:
                shard = self.run / "out" / line["file"]
                if not shard.exists() or shard.stat().st_size != line["bytes"]:
                    (self.units.done / f"{task}-{name}.json").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The end
# ---------------------------------------------------------------------------------------------------------------------


def _finish(out: Path, run: Path, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Write the index and put OUT in place; whoever comes second finds it done."""
    units = Units(run)
    while not (out / INDEX).exists():
        with units.claim("finish") as mine:
            if mine and not out.exists():
                results = [units.result(f"tokenise-{unit['name']}") or {} for unit in plan["units"]]
                index = _index(plan, results, units.result("resolve"))
                for file in (run / "out").iterdir():  # drafts of killed writers
                    if file.name not in {line["file"] for line in index["shards"]}:
                        file.unlink()
                write_index(run / "out", index)
                (run / "out").rename(out)
        time.sleep(0 if mine else 0.2)
    _tidy(run)
    return read_index(out)


def _told(lines: Sequence[dict[str, Any]], name: str) -> str:
    """What the documents of a source say of themselves: all that occurs, in order."""
    found = sorted({label for line in lines for label in line["labels"][name]})
    return ", ".join(found[:MOST_LABELS]) + (f" and {len(found) - MOST_LABELS} more" if len(found) > MOST_LABELS else "")


def _index(plan: dict[str, Any], results: Sequence[dict[str, Any]], removed: dict[str, int] | None) -> dict[str, Any]:
    lines = [r["shard"] for r in results if r["shard"]]
    steps: dict[str, dict[str, int]] = {}
    for result in results:
        for step, counts in result["steps"].items():
            total = steps.setdefault(step, {})
            for key, value in counts.items():
                total[key] = total.get(key, 0) + value
    if removed is not None:
        steps[f"dedup {plan['config']['dedup']}"] = removed
    sources = []
    for source in plan["config"]["sources"]:
        own = [line for line in lines if line["source"] == source["name"]]
        if not own:
            raise UserError(
                "nothing is left of a source",
                where=source["name"],
                value=f"steps: {json.dumps(steps)}" if steps else "no text in it",
                expected="at least one document",
                next="leave the source or the filter out",
            )
        counts = {key: sum(line[key] for line in own) for key in ("tokens", "documents")}
        labels = {name: _told(own, name) for name in ("licence", "language")}
        sources.append({"name": source["name"], **labels, **counts})
    report = {
        "bad": sum(r["bad"] for r in results),
        "named": [text for r in results for text in r["named"]][:NAMED_BAD],
        "steps": steps,
        "empty": sum(r.get("empty", 0) for r in results),  # not in journals of before it was counted
        "absent": absent_columns(Fields(**plan["config"]["fields"]), [r["columns"] for r in results if "columns" in r]),
    }
    settings = {k: v for k, v in plan["config"].items() if k not in ("sources", "unit_bytes")}
    return {"tokenizer": plan["tokenizer"], "settings": settings, "sources": sources, "shards": lines, "report": report}
