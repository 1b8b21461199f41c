"""Shards: tokenised documents in safetensors files that are mapped into memory, and an index written last.

A shard holds `tokens` [N], `ends` [D] (where each document ends), and per document its content hash (`hash`, 16 bytes of
BLAKE2b of the text), its id (`ids`, `id_ends`) and codes for `source`, `licence`, `language`, `provenance` (names in the
header). Documents of one language lie together, so that each is a range of tokens. Any safetensors reader opens a shard.
`index.json` names the shards with their hashes and the tokens of each language; a folder without one is no corpus.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openling.data.sources import Record
from openling.data.tokens import TokenizerInfo
from openling.errors import UserError
from openling.weights.whole import new_file, write_all, write_json

FORMAT, VERSION, INDEX = "openling-data", 1, "index.json"
COLUMNS = ("source", "licence", "language", "provenance")
# Opening a shard reads this many blocks, evenly spread, first and last among them; `verify` reads everything.
SAMPLES, BLOCK = 8, 4096
_NUMPY = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
REBUILD = (
    "openling data verify FOLDER names every damaged shard; openling data build again, with the same command, mends them "
    "(one that a run built for itself: remove its folder, and --resume builds it again)"
)


def text_hash(text: str) -> bytes:
    """16 bytes that name a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def write_shard(path: Path, documents: Sequence[tuple[Record, np.ndarray]], info: TokenizerInfo) -> dict[str, Any]:
    """Write documents with their ids; returns the shard's line of the index."""
    from safetensors.numpy import save

    documents = sorted(documents, key=lambda d: d[0].language)  # otherwise in the order that they came in
    tensors: dict[str, np.ndarray] = {
        "tokens": np.concatenate([ids for _, ids in documents]),
        "ends": np.cumsum([len(ids) for _, ids in documents], dtype=np.int64),
        "hash": np.frombuffer(b"".join(text_hash(r.text) for r, _ in documents), np.uint8).reshape(-1, 16),
    }
    names = [r.id.encode() for r, _ in documents]
    tensors["ids"] = np.frombuffer(b"".join(names), np.uint8)
    tensors["id_ends"] = np.cumsum([len(n) for n in names], dtype=np.int64)
    labels: dict[str, list[str]] = {}
    for column in COLUMNS:
        values = [getattr(r, column) for r, _ in documents]
        labels[column] = sorted(set(values))
        code = {value: i for i, value in enumerate(labels[column])}
        tensors[column] = np.array([code[v] for v in values], np.uint16 if len(code) <= 1 << 16 else np.uint32)
    lengths, languages = np.diff(tensors["ends"], prepend=0), tensors["language"]
    # One key only: the library writes several in any order, and equal documents must give equal bytes.
    about = {"format": FORMAT, "version": VERSION, "tokenizer": info.sha256, "labels": labels}
    data = save(tensors, metadata={"openling": json.dumps(about, sort_keys=True)})
    with new_file(path) as out:
        write_all(out, memoryview(data))
    return {
        "file": path.name,
        "tokens": int(tensors["ends"][-1]),
        "documents": len(documents),
        "labels": {name: sorted(labels[name]) for name in ("licence", "language")},
        "languages": {name: int(lengths[languages == i].sum()) for i, name in enumerate(labels["language"])},
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "samples": _samples(data),
    }


def language_ranges(path: Path, line: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Where each language lies among the tokens of the shard at `path`, from the shard's line of the index."""
    names, found, start = line["labels"]["language"], {}, 0
    tokens = line.get("languages") or ({names[0]: line["tokens"]} if len(names) == 1 else {})
    if not tokens:
        raise UserError(
            "the corpus was built before languages were kept apart", where=path, value=", ".join(names),
            expected="one language, or the tokens of each in the index", next="openling data build, into a new folder",
        )  # fmt: skip
    for name in sorted(tokens):
        found[name] = (start, start + tokens[name])
        start += tokens[name]
    return found


def _samples(data: bytes | mmap.mmap) -> str:
    last = max(0, len(data) - BLOCK)
    digest = hashlib.sha256(str(len(data)).encode())
    for i in range(SAMPLES):
        start = last * i // (SAMPLES - 1)
        digest.update(data[start : start + BLOCK])
    return digest.hexdigest()


class Shard:
    """One shard, mapped into memory. Opening checks size, header and sampled blocks against the index."""

    def __init__(self, path: Path, line: dict[str, Any], info: TokenizerInfo) -> None:
        self.path, self.line = path, line
        self._map = _mapped(path, line)
        if _samples(self._map) != line["samples"]:
            raise UserError("the shard is damaged", where=path, value="sampled blocks differ", expected="the index", next=REBUILD)
        arrays, about = _header(path, self._map)
        if about.get("tokenizer") != info.sha256:
            raise UserError("the shard is of another corpus", where=path, value="tokenizer hash", expected="that of the index")
        self.labels: dict[str, list[str]] = about["labels"]
        self.tokens, self.ends = arrays["tokens"], arrays["ends"]
        self.arrays = arrays
        documents, tokens = line["documents"], line["tokens"]
        if len(self.tokens) != tokens or len(self.ends) != documents or self.ends[-1] != tokens:
            raise UserError("the shard's tables disagree", where=path, value=f"{len(self.tokens)} tokens", expected=tokens)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin from start to before stop, in tokens of this shard."""
        first, last = np.searchsorted(self.ends, [start, stop])
        found = self.ends[first:last]
        found = found[found < min(stop, len(self.tokens))]
        return np.concatenate(([0], found)) if start == 0 < stop else found

    def column(self, name: str) -> list[str]:
        """A label of every document: source, licence, language or provenance."""
        return [self.labels[name][code] for code in self.arrays[name].tolist()]

    def ids(self) -> list[str]:
        """Every document's id."""
        blob, ends = self.arrays["ids"].tobytes(), [0, *self.arrays["id_ends"].tolist()]
        return [blob[a:b].decode() for a, b in zip(ends, ends[1:], strict=False)]

    def problems(self, info: TokenizerInfo) -> list[str]:
        """Everything that is wrong, from every byte; empty for a sound shard."""
        found = []
        if hashlib.sha256(self._map).hexdigest() != self.line["sha256"]:
            found.append("its bytes are not those that were written (SHA-256)")
        ends = self.ends
        if (np.diff(ends, prepend=0) < 1).any():
            found.append("document ends do not rise")
        elif (self.tokens[ends - 1] != info.eos_token_id).any():
            found.append("documents do not end in the end-of-text token")
        if int(self.tokens.max()) >= info.vocab_size:
            found.append(f"token {int(self.tokens.max())} is beyond the vocabulary of {info.vocab_size}")
        return found


def _mapped(path: Path, line: dict[str, Any]) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != line["bytes"]:
                what = "the shard is cut short" if size < line["bytes"] else "the shard is longer than it was written"
                raise UserError(what, where=path, value=f"{size} bytes", expected=f"{line['bytes']} bytes", next=REBUILD)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError("a shard is missing", where=path, expected=f"{line['bytes']} bytes", next=REBUILD) from error
    except OSError as error:  # a folder in its place, a disk that does not read
        raise UserError("a shard cannot be read", where=path, value=error.strerror, expected="a file", next=REBUILD) from error


def _header(path: Path, data: mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a shard, none of them read yet, and what its header says."""
    try:
        size = int.from_bytes(data[:8], "little")
        if size > len(data) - 8:
            raise ValueError("the header is longer than the file")
        header = json.loads(data[8 : 8 + size])
        about = json.loads(header.pop("__metadata__")["openling"])
        arrays = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            array = np.frombuffer(data, np.uint8, count=stop - start, offset=8 + size + start)
            arrays[name] = array.view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the shard's header is damaged", where=path, value=error, next=REBUILD) from error
    return arrays, about


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json with a hash of itself: the last act of a build."""
    body = {"format": FORMAT, "version": VERSION, **index}
    write_json(folder / INDEX, body | {"sha256": _index_hash(body)})


def _index_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a corpus, checked; a `UserError` says what is wrong."""
    path = folder / INDEX
    try:
        body = json.loads(path.read_text())
        stated = body.pop("sha256")
    except FileNotFoundError as error:
        raise UserError(
            "the folder is no corpus", where=folder, expected=INDEX, next="openling data build SOURCES OUT"
        ) from error
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise UserError("the corpus's index is damaged", where=path, value=error, next="build again") from error
    if (body.get("format"), body.get("version")) != (FORMAT, VERSION):
        found = f"{body.get('format')} {body.get('version')}"
        raise UserError("the corpus is of another format", where=path, value=found, expected=f"{FORMAT} {VERSION}")
    if _index_hash(body) != stated:
        raise UserError("the corpus's index has been changed", where=path, value="its hash differs", next="build again")
    return dict(body)
