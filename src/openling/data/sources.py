"""Where documents come from: JSONL, Parquet, plain text and code, cut into units that are read independently of one another.

A unit is a byte range of a JSONL file, a few row groups of a Parquet file, or a handful of files; reading one again gives the
same records. Nothing here knows a tokenizer, and nothing imports torch: worker processes start quickly.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from openling.data.corpus import BUILT_IN, find_corpus
from openling.errors import UserError, nearest

Kind = Literal["jsonl", "parquet", "text", "builtin"]
JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
TEXT = (".txt", ".md", ".rst", ".tex", ".html")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".js"),
    *(".mjs", ".ts", ".jsx", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".swift", ".cs", ".fs", ".hs", ".ml", ".ex"),
    *(".erl", ".clj", ".el", ".lisp", ".sh", ".bash", ".sql", ".proto", ".cmake", ".toml", ".yaml", ".yml", ".json", ".css"),
    *(".vue", ".asm", ".s", ".f90", ".sol", ".lean", ".v", ".mm", ".g", ".m", ".nix", ".tf", ".dockerfile", ".mk"),
)
# Folders of generated or copied files.
SKIPPED = {"node_modules", "__pycache__", "target", "build", "dist", "vendor"}
UNIT_BYTES = 64 << 20
FILES_OF_A_UNIT = 10_000
# One line longer than this is no document but a file of another kind.
LONGEST_LINE = 1 << 30
# "Undetermined", as ISO 639 has it.
UNKNOWN_LANGUAGE = "und"


@dataclass(frozen=True)
class Record:
    """A document with where it is from and under what terms. `provenance` names the recipe that wrote it, if one did."""

    id: str
    text: str
    source: str
    licence: str
    language: str
    provenance: str = ""


@dataclass(frozen=True)
class Source:
    """A named text of a corpus: one path, and what holds for documents that do not say otherwise themselves."""

    name: str
    path: str
    licence: str = "unknown"
    language: str = UNKNOWN_LANGUAGE


@dataclass(frozen=True)
class Fields:
    """Columns of JSONL rows and Parquet tables; only the text must be there."""

    text: str = "text"
    source: str = "source"
    licence: str = "license"
    language: str = "language"


@dataclass(frozen=True)
class Unit:
    """What is read as one piece and becomes one shard: files (`start`, `stop` in bytes or row groups where there is one)."""

    name: str
    source: int
    kind: Kind
    files: tuple[str, ...]
    start: int
    stop: int
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """The fields, for the plan."""
        return asdict(self)


@dataclass
class Seen:
    """What reading came across besides records: documents without text, and the columns that said something of a document."""

    empty: int = 0
    columns: set[str] = field(default_factory=set)


def absent_columns(fields: Fields, seen: Sequence[Sequence[str]]) -> list[str]:
    """The columns of labels that somebody has named and that no row has a word under. seen: `Seen.columns` of the units."""
    named = ((fields.source, Fields.source), (fields.licence, Fields.licence), (fields.language, Fields.language))
    return [name for name, usual in named if name != usual and not any(name in columns for columns in seen)]


class BadInput(UserError):
    """A line or file that cannot be read as text; `--skip-bad` counts and leaves it out."""


Bad = Callable[[BadInput], None]


def parse_source(word: str, *, licences: dict[str, str], languages: dict[str, str]) -> Source:
    """`PATH` or `NAME=PATH` from a command line; the name is the path's last part otherwise."""
    name, equals, path = word.partition("=")
    if not equals or "/" in name:
        name, path = "", word
    path = str(Path(path).expanduser())
    if path in BUILT_IN:
        corpus = find_corpus(path)
        name = name or path
        return Source(name, path, licences.get(name, corpus.licence), languages.get(name, "en"))
    if not Path(path).exists():
        close = nearest(path, [*BUILT_IN, *(str(p) for p in Path(path).parent.glob("*"))])
        raise UserError("there is no such source", value=path, expected="a file, a folder or a built-in text", nearest=close)
    name = name or re.sub(r"(\.\w+)+$", "", Path(path).absolute().name)
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError("a source needs a plain name", value=name, expected="letters, digits, . + - _", next=f"NAME={path}")
    return Source(name, str(Path(path).absolute()), licences.get(name, "unknown"), languages.get(name, UNKNOWN_LANGUAGE))


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by its name."""
    name = path.name.lower()
    if name.endswith(JSONL):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(TEXT + CODE) or name in ("makefile", "dockerfile", "readme", "license"):
        return "text"
    return None


def files_below(path: Path) -> Iterator[Path]:
    """The files of a folder that are read, by name; hidden and generated ones are not, nor links to what lies in it anyway."""
    whole = path.resolve()
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(n for n in inner if not n.startswith(".") and n not in SKIPPED)
        for name in sorted(names):
            file = Path(folder) / name
            again = file.is_symlink() and (not file.is_file() or file.resolve().is_relative_to(whole))
            if not name.startswith(".") and not again and kind_of(file):
                yield file


def plan_units(sources: Sequence[Source], *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of all sources in their order. A source with nothing to read is a `UserError`."""
    units: list[Unit] = []

    def add(source: int, kind: Kind, files: Sequence[str], start: int, stop: int, size: int) -> None:
        units.append(Unit(f"{len(units):06d}", source, kind, tuple(files), start, stop, size))

    for number, source in enumerate(sources):
        before = len(units)
        if source.path in BUILT_IN:
            add(number, "builtin", [source.path], 0, 0, 0)
            continue
        path = Path(source.path)
        if path.is_file() and kind_of(path) is None:
            raise UserError(
                "this kind of file is not read", where=path, value=path.suffix, expected="JSONL, Parquet, text or source code"
            )
        group: list[str] = []
        weight = 0
        for file in files_below(path) if path.is_dir() else [path]:
            size = file.stat().st_size
            kind = kind_of(file)
            if not size:
                continue
            if kind == "text":
                group.append(str(file))
                weight += size
                if weight >= unit_bytes or len(group) >= FILES_OF_A_UNIT:
                    add(number, kind, group, 0, 0, weight)
                    group, weight = [], 0
            elif kind == "parquet":
                for start, stop, share in _row_groups(file, unit_bytes):
                    add(number, kind, [str(file)], start, stop, share)
            elif file.suffix == ".gz":
                add(number, "jsonl", [str(file)], 0, -1, size)
            else:
                for start in range(0, size, unit_bytes):
                    stop = min(start + unit_bytes, size)
                    add(number, "jsonl", [str(file)], start, stop, stop - start)
        if group:
            add(number, "text", group, 0, 0, weight)
        if len(units) == before:
            raise UserError(
                "the source is empty", where=path, expected="JSONL, Parquet, text or source files with something in them"
            )
    return units


def read_unit(unit: Unit, source: Source, fields: Fields, bad: Bad, seen: Seen) -> Iterator[Record]:
    """The records of a unit, those without text counted alone; what cannot be read goes to `bad`, which raises or counts."""
    read = {"jsonl": _jsonl, "parquet": _parquet, "text": _text, "builtin": _builtin}[unit.kind]
    for record in read(unit, source, fields, bad, seen):
        if record.text and not record.text.isspace():
            yield record
        else:
            seen.empty += 1


# ---------------------------------------------------------------------------------------------------------------------
# Each kind
# ---------------------------------------------------------------------------------------------------------------------


def _builtin(unit: Unit, source: Source, fields: Fields, bad: Bad, seen: Seen) -> Iterator[Record]:
    for document in find_corpus(source.path).select("train"):
        yield Record(document.id, document.text, source.name, source.licence, source.language)


def _text(unit: Unit, source: Source, fields: Fields, bad: Bad, seen: Seen) -> Iterator[Record]:
    root = Path(source.path)
    for name in unit.files:
        path = Path(name)
        try:
            data = path.read_bytes()
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            value = hex(data[error.start])
            bad(BadInput("the text is not UTF-8", where=f"{path}, byte {error.start}", value=value, expected="UTF-8", next=SKIP))
            continue
        below = path.relative_to(root).as_posix() if path != root else path.name
        yield Record(below, text, source.name, source.licence, source.language)


SKIP = "mend it, or --skip-bad leaves it out and counts it"


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the lines that begin inside the unit."""
    path = Path(unit.files[0])
    if path.suffix == ".gz":
        place = 0
        try:
            with gzip.open(path) as file:
                for line in file:
                    yield place, line
                    place += len(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                "the file is cut short or damaged",
                where=f"{path}, byte {place} unpacked",
                value=error,
                expected="a whole gzip file",
            ) from error
        return
    with path.open("rb") as file:
        place = unit.start
        if place:  # the line that reaches into the unit belongs to the one before
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while place < unit.stop and (line := file.readline(LONGEST_LINE)):
            yield place, line
            place += len(line)


def _line_number(path: Path, place: int) -> int:
    count, rest = 1, place
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while rest and (block := file.read(min(rest, 1 << 20))):
            count += block.count(b"\n")
            rest -= len(block)
    return count


def _jsonl(unit: Unit, source: Source, fields: Fields, bad: Bad, seen: Seen) -> Iterator[Record]:
    path = Path(unit.files[0])

    def refuse(what: str, place: int, value: object) -> None:
        where, row = f"{path}, line {_line_number(path, place)}", f'UTF-8 JSON: {{"{fields.text}": "..."}}'
        bad(BadInput(what, where=where, value=value, expected=row + _flat(fields), next=SKIP))

    for place, line in _lines(unit):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            refuse("the line is not UTF-8", place, f"{hex(line[error.start])} at byte {error.start} of the line")
            continue
        except (ValueError, RecursionError):
            refuse("the line is not JSON", place, line[:60].decode("utf-8", "replace").rstrip("\n"))
            continue
        text = row.get(fields.text) if isinstance(row, dict) else None
        if text is None and isinstance(row, dict) and fields.text in row:
            text = ""  # as in a table
        if not isinstance(text, str):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            refuse(f'the line has no string under "{fields.text}"', place, found)
        elif not _encodes(text):
            refuse("the text has half of a surrogate pair", place, ascii(text[:60]))
        else:
            yield _record(f"{path.name}@{place}", text, row, source, fields, seen)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flat(fields: Fields) -> str:
    return "; fields of the top level alone are read" if "." in fields.text else ""


def _record(id: str, text: str, row: dict[str, Any], source: Source, fields: Fields, seen: Seen) -> Record:
    def column(name: str, default: str) -> str:
        value = row.get(name)
        if not (isinstance(value, str) and value and _encodes(value)):
            return default
        seen.columns.add(name)
        return value

    licence, language = column(fields.licence, source.licence), column(fields.language, source.language)
    return Record(id, text, column(fields.source, source.name), licence, language)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow", value="not installed", next="pip install 'openling[data]'") from error
    return parquet


def _open_parquet(path: Path) -> Any:
    parquet = _pyarrow()
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        what = "the Parquet file is cut short or damaged"
        raise UserError(what, where=path, value=str(error).split("\n")[0], expected="a whole Parquet file") from error


def _row_groups(path: Path, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first, behind the last, bytes) of runs of row groups."""
    about = _open_parquet(path).metadata
    start, weight = 0, 0
    for group in range(about.num_row_groups):
        weight += about.row_group(group).total_byte_size
        if weight >= unit_bytes or group + 1 == about.num_row_groups:
            yield start, group + 1, weight
            start, weight = group + 1, 0


def _parquet(unit: Unit, source: Source, fields: Fields, bad: Bad, seen: Seen) -> Iterator[Record]:
    path = Path(unit.files[0])
    file = _open_parquet(path)
    names = file.schema_arrow.names
    if fields.text not in names:
        raise UserError(
            "the table has no such column",
            where=path,
            value=fields.text,
            expected=", ".join(names) + _flat(fields),
            next="--text-field NAME",
        )
    columns = [n for n in (fields.text, fields.source, fields.licence, fields.language) if n in names]
    for group in range(unit.start, unit.stop):
        row = 0
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    text, where = values[fields.text], f"{path}, row group {group}, row {row}"
                    row += 1
                    if text is None or isinstance(text, str):
                        yield _record(f"{path.name}@{group}.{row - 1}", text or "", values, source, fields, seen)
                    else:
                        raise UserError("the column is no text", where=where, value=type(text).__name__, expected="strings")
        except (OSError, ValueError) as error:
            what = "the Parquet file is damaged"
            value = str(error).split("\n")[0]
            raise UserError(what, where=f"{path}, row group {group}", value=value, expected="readable pages") from error
