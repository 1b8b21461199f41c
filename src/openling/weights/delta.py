"""A delta folder: what a checkpoint folder has that its teacher lacks, and how the two make that folder again, to the bit.

`delta.json` says whose delta it is (a hash of all tensors of the teacher), lists the tensors of the result file by file, and
holds hashes of what lies here and of what must come out. A tensor that is the teacher's, perhaps renamed or rows of several
joined, is only named. The others lie in parts of at most 25 MB: as they are (`exact`), or matrices as `int8`: integers, and one
FP32 scale per row. The folder that an int8 delta stands for is *defined* as integers times scales, so both forms are exact.
FP8 matrices and their scales lie there as they are in both.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from torch import Tensor

from openling.config.section import refusal
from openling.errors import Failure, UserError
from openling.weights.files import WEIGHTS, Kept, companions, file_hash, first_difference, write_shard
from openling.weights.folder import EMBEDDINGS, LM_HEAD, Opened, open_folder
from openling.weights.fp8 import Dequantised
from openling.weights.headers import DTYPES, write_header
from openling.weights.io import INDEX, CheckpointReader, FolderWriter, TensorFiles, checked_folder, raw_bytes, read_json
from openling.weights.names import Binding
from openling.weights.whole import new_file, write_all

RECORD, README = "delta.json", "README.md"
PART = "delta-{:05d}.safetensors"
# Files of the result that the teacher has not, under this prefix: README.md and config.json are none of the delta's own.
COMPANION = "hybrid."
# A part's tensors; with its header it stays below 25 MB.
PART_BYTES = 24_000_000
LARGEST = 127
ROUNDED = ("BF16", "F16", "F32")

Form = Literal["int8", "exact"]
# What a file may be called: a name from a record must not lead out of a folder.
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
FileName = Annotated[str, Field(pattern=FILE_NAME)]


class Content(BaseModel):
    """What a file holds."""

    bytes: int
    sha256: str


class Entry(BaseModel):
    """A tensor of the result; `teacher`: the teacher's tensors it consists of, or nothing where it lies in the parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    teacher: tuple[str, ...] = ()

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype} is none of {', '.join(DTYPES)}")
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the result."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Teacher(BaseModel):
    """Whose delta it is; `sha256` is that of all its tensors, however they are split into files."""

    name: str
    sha256: str


class Delta(BaseModel):
    """`delta.json`. about: how the hybrid came to be, in the maker's words."""

    format: Literal["openling delta 1"] = "openling delta 1"
    form: Form
    teacher: Teacher
    about: dict[str, Any]
    parts: dict[FileName, Content]
    copied: dict[FileName, Literal["teacher", "delta"]]
    result: dict[FileName, Content]
    shards: dict[FileName, list[Entry]]

    @property
    def changed(self) -> list[Entry]:
        """Tensors that are not the teacher's."""
        return [entry for entries in self.shards.values() for entry in entries if not entry.teacher]


# ---------------------------------------------------------------------------------------------------------------------
# Making
# ---------------------------------------------------------------------------------------------------------------------


def make_delta(teacher: Path, hybrid: Path, out: Path, *, form: Form, about: dict[str, Any], licence: str | None = None) -> Delta:
    """Write what `hybrid` has that `teacher` lacks to the new folder `out`, which appears whole or not at all."""
    old, new = open_folder(teacher), open_folder(hybrid)
    theirs, ours = old.raw, new.raw
    if ours.stale_in:
        fix = f"openling convert --to hf {hybrid} NEW, and the delta of NEW"
        raise UserError("this folder shares files with another one", where=hybrid, expected="files of its own", next=fix)
    for name in (*ours.shards, *(path.name for path in companions(hybrid))):
        if not re.fullmatch(FILE_NAME, name):
            expected = "letters, digits, _, - and . in its name"
            raise UserError("a delta takes no file of this name", where=hybrid / name, expected=expected, next="move it away")
    sources = _sources(old, new)
    shards: dict[str, list[Entry]] = {shard: [] for shard in ours.shards}
    with FolderWriter(out) as writer:
        scales = new.reader.scales if isinstance(new.reader, Dequantised) else set()
        parts = _Parts(writer.draft, form, scales)
        for name, span in ours.spans.items():
            entry = Entry(name=name, dtype=span.dtype, shape=span.shape)
            kept = Kept(name, sources.get(name, ()))
            if kept.pieces and first_difference(kept, ours, theirs) is None:
                entry.teacher = kept.pieces
            else:
                parts.add(entry, ours.read(name))
            shards[span.shard].append(entry)
        written = parts.finish()
        copied, result = _companions(teacher, hybrid, writer), {}
        for shard, entries in shards.items():
            digest, size = hashlib.sha256(), 0
            for piece in _file(entries, theirs, TensorFiles.of(writer.draft, written)):
                digest.update(piece)
                size += len(piece)
            result[shard] = Content(bytes=size, sha256=digest.hexdigest())
        result |= {name: _content(hybrid / name) for name, of in copied.items() if of == "delta"}
        whose = Teacher(name=teacher.absolute().name, sha256=tensors_hash(theirs))
        about = about | ({"rounding error": parts.error} if form == "int8" else {})
        delta = Delta(form=form, teacher=whose, about=about, parts=written, copied=copied, result=result, shards=shards)
        writer.add_file(RECORD, delta.model_dump_json(indent=1) + "\n")
        writer.add_file(README, card(out.absolute().name, delta, licence))
    return delta


def _sources(old: Opened, new: Opened) -> dict[str, tuple[str, ...]]:
    """For every tensor of the hybrid that may be the teacher's: the names of its pieces there."""
    bindings = dict(old.bindings)
    bindings.setdefault(LM_HEAD, bindings[EMBEDDINGS])  # tied in the teacher, written out in the hybrid
    found: dict[str, tuple[str, ...]] = {}
    for binding in new.bindings.values():
        if binding.ours in bindings:
            found |= zip(binding.theirs, _pieces(bindings[binding.ours], binding), strict=False)
    if isinstance(new.reader, Dequantised) and isinstance(old.reader, Dequantised):
        for name, form in new.reader.forms.items():
            scales = tuple(piece + form.suffix for piece in found.get(name, ()))
            found[name + form.suffix] = scales if old.reader.scales.issuperset(scales) else ()
    return {name: pieces for name, pieces in found.items() if pieces}


def _pieces(old: Binding, new: Binding) -> list[tuple[str, ...]]:
    if len(old.theirs) == len(new.theirs):
        return [(name,) for name in old.theirs]
    return [old.theirs] if old.op == "rows" else []


class _Parts:
    """The parts of a delta: a part is written when the next tensor would make it too large."""

    def __init__(self, folder: Path, form: Form, scales: set[str]) -> None:
        self.folder, self.form, self.scales = folder, form, scales
        self.pending: dict[str, Tensor] = {}
        self.written: dict[str, Content] = {}
        self.lost = self.energy = 0.0

    @property
    def error(self) -> float:
        """Squared error of the rounding over the squares of what was rounded."""
        return self.lost / self.energy if self.energy else 0.0

    def add(self, entry: Entry, tensor: Tensor) -> None:
        """A tensor of the result, in pieces of rows that fit a part."""
        rows = torch.atleast_1d(tensor)
        fit = max(1, PART_BYTES * len(rows) // max(1, rows.nbytes))
        for i, piece in enumerate(rows.split(fit)):
            if self._is_rounded(entry):
                whole, scale = quantise(piece, entry.name)
                difference = dequantise(whole, scale, piece.dtype).double() - piece.double()
                self.lost += float(difference.square().sum())
                self.energy += float(piece.double().square().sum())
                self._append(_key(entry, i), whole)
                self._append(_key(entry, i) + ":scale", scale)
            else:
                self._append(_key(entry, i), piece)

    def _is_rounded(self, entry: Entry) -> bool:
        matrix = len(entry.shape) == 2 and entry.dtype in ROUNDED
        return self.form == "int8" and matrix and entry.name not in self.scales

    def _append(self, name: str, tensor: Tensor) -> None:
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > PART_BYTES:
            self.finish()
        self.pending[name] = tensor

    def finish(self) -> dict[str, Content]:
        """Write what is left; contents of all parts by name."""
        if self.pending:
            file = write_shard(self.folder / PART.format(len(self.written) + 1), self.pending)
            assert file.sha256 is not None
            self.written[file.file] = Content(bytes=file.bytes, sha256=file.sha256)
            self.pending = {}
        return self.written


def _key(entry: Entry, index: int) -> str:
    return f"{entry.name}:{index}"


def quantise(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127, and FP32 scales [N, 1], of a matrix [N, K]: of each row the largest value becomes 127."""
    rows = rows.float()
    if not rows.isfinite().all():
        raise UserError("the weights hold NaN or infinite values", where=name, expected="finite numbers")
    scale = rows.abs().amax(1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (rows / scale).round().to(torch.int8), scale


def dequantise(whole: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that integers and scales stand for: one product and one rounding each, which every machine does alike."""
    return (whole.float() * scale).to(dtype)


def _companions(teacher: Path, hybrid: Path, writer: FolderWriter) -> dict[str, Literal["teacher", "delta"]]:
    """Files of the hybrid that are no weights, and where each comes from."""
    index = [hybrid / INDEX] if (hybrid / INDEX).exists() else []
    out: dict[str, Literal["teacher", "delta"]] = {}
    for path in [*companions(hybrid), *index]:
        data, same = path.read_bytes(), teacher / path.name
        out[path.name] = "teacher" if same.is_file() and same.read_bytes() == data else "delta"
        if out[path.name] == "delta":
            writer.add_file(COMPANION + path.name, data)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Applying
# ---------------------------------------------------------------------------------------------------------------------


def apply_delta(teacher: Path, folder: Path, out: Path) -> Path:
    """Write the folder that `folder` is the delta of to the new folder `out`, which appears whole and checked or not at all."""
    delta = read_delta(folder)
    theirs = CheckpointReader(teacher)
    found = tensors_hash(theirs)
    if found != delta.teacher.sha256:
        raise UserError(
            "the delta is of another teacher",
            where=teacher,
            value=f"tensors with hash {found[:16]}...",
            expected=f"{delta.teacher.name}, {delta.teacher.sha256[:16]}...",
            next="the revision, the dtype and the source of the weights all count",
        )
    pieces = [name for entries in delta.shards.values() for entry in entries for name in entry.teacher]
    if absent := [name for name in pieces if name not in theirs]:
        raise UserError("the record of the delta names a tensor that its teacher lacks", where=folder / RECORD, value=absent[0])
    origin = {name: teacher / name if of == "teacher" else folder / (COMPANION + name) for name, of in delta.copied.items()}
    for name, path in origin.items():
        if delta.copied[name] == "delta":
            _check(path, delta.result[name])
        elif not path.is_file():
            raise UserError("the teacher lacks a file that the hybrid has from it", where=path, next="copy or download it again")
    parts = TensorFiles.of(folder, delta.parts)
    with FolderWriter(out, expected_bytes=sum(content.bytes for content in delta.result.values())) as writer:
        for shard, entries in delta.shards.items():
            with new_file(writer.draft / shard) as file:
                for piece in _file(entries, theirs, parts):
                    write_all(file, piece)
            if _content(writer.draft / shard) != delta.result[shard]:
                raise Failure("what came out is not what the delta promises", where=shard, next="make the delta again")
        for name, path in origin.items():
            writer.add_file(name, path.read_bytes())
        CheckpointReader(writer.draft)  # with an index of the teacher's, too, all tensors lie where it says
    return writer.out


def read_delta(folder: Path) -> Delta:
    """The record of a delta folder whose parts are all there, byte for byte."""
    folder = checked_folder(folder)
    record = read_json(folder / RECORD)
    try:
        delta = Delta.model_validate(record)
    except ValidationError as error:
        what = "the record of the delta cannot be read"
        raise refusal(error, lambda name: f"{folder / RECORD}, {name or 'the file'}", what, suggest=False) from error
    made = {*delta.shards, *(name for name, of in delta.copied.items() if of == "delta")}
    if missing := made - set(delta.result):
        raise UserError("the record of the delta is incomplete", where=folder / RECORD, value=f"no hash of {min(missing)}")
    if found := _contradiction(delta, made):
        next_step = "copy or download the delta again"
        raise UserError("the record of the delta contradicts itself", where=folder / RECORD, value=found, next=next_step)
    for part, content in delta.parts.items():
        _check(folder / part, content)
    return delta


def _contradiction(delta: Delta, made: set[str]) -> str | None:
    """Why no whole checkpoint folder can come of a record, or None. made: the files written and checked by hash."""
    names = [entry.name for entries in delta.shards.values() for entry in entries]
    if not names:
        return "it lists no tensors"
    if len(names) > len(set(names)):
        return f"the tensor {next(name for name in names if names.count(name) > 1)} is listed twice"
    if twice := delta.shards.keys() & delta.copied.keys():
        return f"{min(twice)} is both made of tensors and copied"
    if weights := [name for name in delta.copied if Path(name).suffix in WEIGHTS]:
        return f"{weights[0]} holds weights and is copied, not made of tensors"
    if unmade := set(delta.result) - made:
        return f"there is a hash of {min(unmade)}, which is not made"
    return None if "config.json" in delta.copied else "it has no config.json"


def first_other(delta: Delta, out: Path) -> Path | None:
    """The first file of the folder `out` that is absent, or not what the delta makes; the teacher's need only be there."""
    absent = (out / name for name in (*delta.shards, *delta.copied) if not (out / name).is_file())
    other = (out / name for name, content in delta.result.items() if _content(out / name) != content)
    return next(absent, None) or next(other, None)


def _check(path: Path, content: Content) -> None:
    """Raise where a file is not the one that a record names; a size is told apart from a change."""
    if not path.is_file():
        raise UserError("a file is missing", where=path, expected=f"{content.bytes:,} bytes", next="copy or download it again")
    size = path.stat().st_size
    if size != content.bytes:
        raise UserError(
            "a file is truncated, or another one",
            where=path,
            value=f"{size:,} bytes",
            expected=f"{content.bytes:,} bytes",
            next="copy or download it again",
        )
    if (found := _content(path).sha256) != content.sha256:
        raise UserError(
            "a file is damaged, or another one",
            where=path,
            value=f"sha256 {found[:16]}...",
            expected=f"{content.sha256[:16]}...",
            next="copy or download it again",
        )


def _content(path: Path) -> Content:
    return Content(bytes=path.stat().st_size, sha256=file_hash(path))


def _file(entries: list[Entry], teacher: TensorFiles, parts: TensorFiles) -> Iterator[memoryview]:
    """A safetensors file of the result: its header, then every tensor, one piece in memory at a time."""
    yield memoryview(write_header((e.name, e.dtype, e.shape, e.nbytes) for e in entries))
    for entry in entries:
        if entry.teacher:
            yield from (raw_bytes(teacher.read(name)) for name in entry.teacher)
            continue
        index = 0
        while (key := _key(entry, index)) in parts:
            scale = parts.read(key + ":scale") if key + ":scale" in parts else None
            stored = parts.read(key)
            yield raw_bytes(stored if scale is None else dequantise(stored, scale, DTYPES[entry.dtype]))
            index += 1


def tensors_hash(reader: TensorFiles) -> str:
    """Of all tensors by name, so that it does not depend on how they are split into files."""
    digest = hashlib.sha256()
    for name in sorted(reader.names()):
        digest.update(f"{name} {reader.spans[name].dtype} {list(reader.shape(name))}\n".encode())
        digest.update(raw_bytes(reader.read(name)))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def card(name: str, delta: Delta, licence: str | None) -> str:
    """README.md of a delta folder."""
    matter = [f"base_model: {delta.teacher.name}", "tags: [openling, delta]", *([f"license: {licence}"] if licence else [])]
    values = sum(math.prod(entry.shape) for entry in delta.changed)
    size = sum(content.bytes for content in delta.parts.values())
    how = "stored as they are" if delta.form == "exact" else "matrices as 8-bit integers with one scale per row"
    rows = {
        "teacher": delta.teacher.name,
        "hash of its tensors": delta.teacher.sha256,
        "changed": f"{len(delta.changed):,} tensors, {values:,} values, {how}: {size / 1e6:.1f} MB in {len(delta.parts)} parts",
        **{key: value for key, value in delta.about.items() if isinstance(value, str)},
    }
    if delta.form == "int8":
        rows["rounding error"] = f"{delta.about['rounding error']:.2e} of the squares of what was rounded"
    table = "\n".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items())
    measured = delta.form == "int8" and "losses" in delta.about
    rounded = "\nLosses were measured before the changed matrices were rounded to 8 bits.\n" if measured else ""
    return (
        "---\n" + "\n".join(matter) + f"\n---\n\n# {name}\n\nNo model by itself: what one has that its teacher "
        f"lacks. Both together are a checkpoint folder:\n\n```\nopenling delta apply {delta.teacher.name} {name} OUT\n```\n\n"
        f"| | |\n|---|---|\n{table}\n{rounded}\nEverything else that is known of it is in `{RECORD}`, under `about`.\n"
    )
