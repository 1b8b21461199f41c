"""Which files a folder consists of that keeps most of another folder's bytes: shards linked, copied whole or in part.

A shard whose tensors are all kept under their names is linked or copied whole. Of a mixed one `copy` writes a clean copy without
what is no longer valid; `link` links it all the same and leaves stale tensors out of the index (`stale_in` names such shards), as
long as most of its bytes are still valid. Tensors kept under another name never lie in a linked file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from openling.errors import UserError
from openling.weights.cluster import ENGINES, launch_script, read_checkpoint
from openling.weights.files import Kept, companions, copy_file, copy_tensors
from openling.weights.fp8 import Dequantised
from openling.weights.io import INDEX, SINGLE, CheckpointReader, TensorFiles, write_error
from openling.weights.names import Binding

Mode = Literal["link", "copy"]
# Sorts behind numbered shards: of two equal names readers that open every file take the last, which must be the new one.
RENAMED = "model-kept-{:05d}.safetensors"
RENAMED_BYTES = 4 << 30
# In place of a shard's name that a file of the result may have; sorts in front of all that is new.
MOVED = "model-from-{:05d}.safetensors"
# Names of shards that a result keeps: not of the files that conversions make, nor of small files.
PLAIN = re.compile(r"(?!\.|model-(layer|kept|from)-\d+\.)[^/]+\.safetensors")
# What the small files of a linked folder say of its stale tensors.
NOTES = {
    "openling.json": rb',\s*"note": "linked shards hold stale tensors[^"]*"',
    "README.md": rb"\| note \| linked shards hold stale tensors.*\n",
}


@dataclass(frozen=True)
class FilePlan:
    """One file of the new folder. `source`: the shard that is linked or copied whole; `stale`: not all of it counts."""

    name: str
    action: Literal["link", "copy", "filter"]
    tensors: tuple[Kept, ...]
    bytes: int
    source: str | None = None
    stale: bool = False


def kept_tensors(old: dict[str, Binding], new: list[Binding], reader: TensorFiles) -> list[Kept]:
    """Tensors of a new folder (`new`) whose values are the old one's, scales of FP8 matrices included."""
    kept: list[Kept] = []
    for binding in new:
        theirs = old[binding.ours].theirs
        sources = [theirs] if old[binding.ours].op == "rows" else [(piece,) for piece in theirs]
        for name, pieces in zip(binding.theirs, sources, strict=True):
            kept.append(Kept(name, pieces))
            if isinstance(reader, Dequantised) and pieces[0] in reader.forms:
                kept.append(_scales(name, pieces, reader))
    return kept


def _scales(name: str, pieces: tuple[str, ...], reader: Dequantised) -> Kept:
    form = reader.forms[pieces[0]]
    same = all(reader.forms.get(piece) == form for piece in pieces)
    if not same or (form.kind == "block" and any(reader.shape(p)[0] % form.block[0] for p in pieces[:-1])):
        raise UserError(
            "FP8 matrices that are joined must end on whole blocks",
            where=", ".join(pieces),
            value=[reader.shape(p)[0] for p in pieces],
            expected=f"multiples of {form.block[0]} rows",
            next="convert both stages at once, so that no such layer is kept",
        )
    return Kept(name + form.suffix, tuple(piece + form.suffix for piece in pieces))


def plan_files(reader: CheckpointReader, kept: list[Kept], mode: Mode) -> list[FilePlan]:
    """The files that hold `kept`, source shard by source shard; no two have one name."""
    by_shard: dict[str, list[Kept]] = defaultdict(list)
    for tensor in kept:
        by_shard[reader.spans[tensor.pieces[0]].shard].append(tensor)
    plans: list[FilePlan] = []
    renamed: list[Kept] = []
    for shard in reader.shards:
        tensors = sorted(by_shard[shard], key=lambda t: reader.spans[t.pieces[0]].start)
        name = "model-00001-of-00001.safetensors" if shard == SINGLE else shard
        if not PLAIN.fullmatch(name) or (name != shard and name in reader.shards):
            name = MOVED.format(len(plans) + 1)
        same = [t for t in tensors if t.pieces == (t.name,)]
        size = (reader.folder / shard).stat().st_size
        whole = len(same) == len(tensors) == reader.stored_in[shard]
        if whole or (mode == "link" and 2 * _bytes(reader, same) >= size):
            plans.append(FilePlan(name, mode if whole else "link", tuple(same), size, shard, stale=not whole))
            renamed += [t for t in tensors if t.pieces != (t.name,)]
        elif tensors:
            plans.append(FilePlan(name, "filter", tuple(tensors), _bytes(reader, tensors)))
    return plans + _renamed(reader, renamed)


def _renamed(reader: TensorFiles, tensors: list[Kept]) -> list[FilePlan]:
    groups: list[list[Kept]] = []
    for tensor in tensors:
        if not groups or _bytes(reader, [*groups[-1], tensor]) > RENAMED_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    return [FilePlan(RENAMED.format(i + 1), "filter", tuple(g), _bytes(reader, g)) for i, g in enumerate(groups)]


def _bytes(reader: TensorFiles, tensors: list[Kept]) -> int:
    return sum(reader.nbytes(piece) for tensor in tensors for piece in tensor.pieces)


def copy_folder(source: str | Path, out: str | Path) -> Path:
    """A clean copy of a checkpoint folder: the tensors its index promises and the small files, nothing stale."""
    reader, final = CheckpointReader(source), Path(out).absolute()
    if os.path.lexists(final):
        raise UserError("the output folder exists already", where=final, next="name another folder, or remove this one first")
    draft = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        plans = plan_files(reader, [Kept(name, (name,)) for name in reader.names()], "copy")
        for plan in plans:
            if plan.source is None:
                copy_tensors(reader, list(plan.tensors), draft / plan.name)
            else:
                copy_file(reader.folder / plan.source, draft / plan.name)
        weight_map = {t.name: plan.name for plan in plans for t in plan.tensors}
        index = {"metadata": {"total_size": reader.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, data in clean_companions(reader).items():
            (draft / name).write_bytes(data)
        draft.rename(final)
    except OSError as error:
        raise write_error(error, final) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def clean_companions(reader: CheckpointReader) -> dict[str, bytes]:
    """A folder's small files; those of a linked one as they are once its tensors lie in files of their own."""
    found = {path.name: path.read_bytes() for path in companions(reader.folder)}
    if not reader.stale_in:
        return found
    clean = replace(read_checkpoint(reader.folder), stale=False)
    found |= {f"launch_{engine}.sh": launch_script(engine, clean).encode() for engine in ENGINES}
    for name, note in NOTES.items():
        if name in found:
            found[name] = re.sub(note, b"", found[name])
    return found
