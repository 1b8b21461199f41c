"""The draft of a conversion's result: its small files, then the one rename that makes it OUT."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openling import __version__
from openling.environment import peak_memory
from openling.errors import UserError
from openling.migrate.findings import Findings
from openling.weights.export import add_companions, add_launch_scripts, json_text, ling_config, model_card
from openling.weights.files import MANIFEST, file_hash, small_files
from openling.weights.folder import EMBEDDINGS
from openling.weights.fp8 import quantization_config
from openling.weights.headers import Span
from openling.weights.io import INDEX, TensorFiles
from openling.weights.remote import REMOTE_FILE, remote_code
from openling.weights.units import Units, broken
from openling.weights.whole import new_file, write_all, write_json

if TYPE_CHECKING:
    from openling.migrate.stream import Job, Outline

WRITTEN = {"file", "action", "bytes", "sha256"}  # what a unit records of its file
LAYER_FILE = "model-layer-{:05d}.safetensors"


class Draft:
    """The folder `OUT.run/draft` of a job, filled by whoever takes part. shards: the source's, as they were at the beginning."""

    def __init__(self, job: Job, plan: Outline, run: Path, shards: dict[str, dict[str, object]]) -> None:
        self.job, self.plan, self.run, self.shards = job, plan, run, shards
        self.folder = run / "draft"

    def made(self) -> dict[str, str]:
        """The weight files of the result, by the unit that makes each."""
        files = {f"file-{file.name}": file.name for file in self.plan.files}
        return files | {f"layer-{i}": LAYER_FILE.format(i) for i in self.plan.layers}

    def recheck(self, units: Units, *, thorough: bool) -> list[str]:
        """Have units done again whose file is not as they left it, and walks that lack a layer; their names.

        Sizes are always compared, hashes where `thorough`, and of fitted layers alone: these are few bytes of a model, and later
        layers are fitted to what they compute. Hashing copies would be a second reading of terabytes; `openling verify` does it.
        """
        self.folder.mkdir(exist_ok=True)
        for unit, name in self.made().items():
            result = units.result(unit)
            if result is not None and (result.get("file") != name or WRITTEN - result.keys()):
                raise broken(units.done / f"{unit}.json", self.run, f"it is not about {name}")
        wrong = [unit for unit, name in self.made().items() if self._differs(units.result(unit), self.folder / name, thorough)]
        for unit in wrong:
            units.forget(unit)
        for step in self.plan.steps:
            walk = f"walk-{step.stage}"
            if units.result(walk) is not None and any(units.result(f"layer-{i}") is None for i in step.layers):
                units.forget(walk)
                wrong.append(walk)
        return wrong

    def _differs(self, result: dict[str, Any] | None, path: Path, thorough: bool) -> bool:
        if result is None:
            return False
        if path.is_symlink() or not path.is_file() or path.stat().st_size != result["bytes"]:
            return True
        return thorough and result["action"] == "new" and file_hash(path) != result["sha256"]

    def _remove_strangers(self) -> None:
        """Whatever else lies in the draft: files of processes that were killed, or of no process of ours."""
        kept = set(self.made().values())
        for path in [path for path in self.folder.iterdir() if path.name not in kept]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def finish(self, results: dict[str, dict[str, Any]], begun: float) -> None:
        """Write the small files and the run's report; the draft becomes OUT. results: of every unit that made a file."""
        plan, out = self.plan, self.job.out.absolute()
        self._remove_strangers()
        weight_map = {t.name: f.name for f in plan.files for t in f.tensors}
        made = TensorFiles.of(self.folder, [LAYER_FILE.format(i) for i in plan.layers])
        weight_map |= {name: span.shard for name, span in made.spans.items()}
        sizes = {t.name: sum(plan.raw.nbytes(p) for p in t.pieces) for f in plan.files for t in f.tensors}
        metadata: dict[str, Any] = {"total_size": sum(sizes.values()) + made.total_bytes}
        stale = [f.name for f in plan.files if f.stale]
        metadata |= {"stale_in": stale} if stale else {}
        self.add_file(INDEX, json_text({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}))
        spans = {t.name: plan.raw.spans[t.pieces[0]] for f in plan.files for t in f.tensors} | made.spans
        config = self._config(spans)
        self.add_file("config.json", json_text(config))
        self.add_file(REMOTE_FILE, remote_code())
        add_companions(self, plan.opened.folder, plan.target)
        stages = ", ".join(step.stage for step in plan.steps)
        fitted = "weights alone" if self.job.windows is None else f"{sum(w.numel() for w in self.job.windows)} tokens"
        record = {"openling_version": __version__, "base_model": plan.opened.folder.name, "made by": "openling convert"}
        record |= {"stages": stages, "fitted on": fitted}
        if stale:
            record |= {"note": "linked shards hold stale tensors; before serving: openling convert THIS CLEAN --to hf"}
        names, total = list(weight_map), metadata["total_size"]
        add_launch_scripts(self, config, plan.opened.folder, names, total, stale=bool(stale))
        self.add_file("openling.json", json_text(record))
        self.add_file("README.md", model_card(out.name, config, plan.opened.folder, record))
        files = {r["file"]: {k: r[k] for k in ("action", "bytes", "sha256")} for r in results.values()}
        files |= small_files(self.folder)
        self.add_file(MANIFEST, json_text({"settings": self.job.settings(), "shards": self.shards, "files": files}))
        write_json(self.run / "report.json", self._report(results, begun))
        if os.path.lexists(out):
            raise UserError("the output has appeared meanwhile", where=out, next="move it away, then add --resume")
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        self.folder.rename(out)

    def add_file(self, name: str, data: str | bytes) -> None:
        """Write a small file of the draft, as a new one: nothing is written through a link to the source."""
        with new_file(self.folder / name) as handle:
            write_all(handle, memoryview(data.encode() if isinstance(data, str) else data))

    def _config(self, stored: dict[str, Span]) -> dict[str, Any]:
        opened = self.plan.opened
        dtype = self.plan.raw.dtype(opened.bindings[EMBEDDINGS].theirs[0])
        config = ling_config(self.plan.target, dtype)
        quantised = opened.hf_config.get("quantization_config")
        if not quantised:
            return config
        return config | {"quantization_config": quantization_config(quantised, stored, self.plan.raw)}

    def _report(self, results: dict[str, dict[str, Any]], begun: float) -> dict[str, Any]:
        moved: dict[str, int] = dict.fromkeys(("link", "copy", "filter", "new"), 0)
        for result in results.values():
            moved[result["action"]] += result["bytes"]
        found = {kind: [a for r in results.values() for a in r.get(kind, ())] for kind in Findings().as_dict()}
        return {
            "seconds": time.monotonic() - begun,
            "bytes linked": moved["link"],
            "bytes copied": moved["copy"] + moved["filter"],
            "bytes of new layers": moved["new"],
            "bytes of old attention": self.plan.attention_bytes(),
            "peak memory bytes": peak_memory(),
            **found,
        }
