"""Copies across a whole corpus: exact ones by hash, near ones by MinHash signatures and banding. The first of each stays.

Signatures come from rensa, a maintained library; which documents to compare is decided here, because the order of documents,
not that of processes, must say which copy stays. 528 bytes per document are held at once: 100 million take 53 GB.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openling.data.shards import text_hash
from openling.data.sources import Record
from openling.errors import UserError
from openling.weights.whole import new_file, write_all

NUM_PERM, SEED, SHINGLE = 128, 42, 5
# 16 bands of 8 hashes: a pair of similarity 0.8 meets in some band with probability 0.947, one of 0.5 with 0.06.
BANDS = 16
# A word, or one letter of a script that is written without spaces.
WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣฀-๿]|[^\W぀-ヿ㐀-鿿가-힣฀-๿]+")


def parse_dedup(text: str) -> tuple[str, float]:
    """(mode, threshold) of `none`, `exact`, `near` or `near:0.7`."""
    mode, colon, number = text.partition(":")
    try:
        threshold = float(number) if colon else 0.8
    except ValueError:
        threshold = -1.0
    if mode not in ("none", "exact", "near") or (colon and mode != "near") or not 0.5 <= threshold <= 1:
        raise UserError(
            "this is no way to remove copies", where="--dedup", value=text, expected="none, exact, near, near:0.5 to near:1"
        )
    if mode == "near":
        _rensa()
    return mode, threshold


def _rensa() -> Any:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise UserError("near-duplicates need rensa", value="not installed", next="pip install 'openling[data]'") from error
    return RMinHash


def shingles(text: str) -> list[str]:
    """Runs of SHINGLE words, in lower case; of a shorter text, the whole."""
    words = WORD.findall(text.lower())
    return [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]


def signatures(records: Iterable[Record], mode: str) -> dict[str, np.ndarray]:
    """`hash` [D, 16] and, for `near`, `minhash` [D, NUM_PERM] of a unit's documents."""
    texts = [r.text for r in records]
    found: dict[str, np.ndarray] = {}
    found["hash"] = np.frombuffer(b"".join(map(text_hash, texts)), np.uint8).reshape(-1, 16)
    if mode == "near":
        rows = _rensa().digest_matrix_from_token_sets([shingles(t) for t in texts], NUM_PERM, SEED).to_rows() if texts else []
        found["minhash"] = np.array(rows, np.uint32).reshape(-1, NUM_PERM)
    return found


def copies(parts: Sequence[dict[str, np.ndarray]], mode: str, threshold: float) -> tuple[np.ndarray, dict[str, int]]:
    """(which documents of all units go, counts)."""
    hashes = np.concatenate([p["hash"] for p in parts])
    _, first = np.unique(np.ascontiguousarray(hashes).view("V16").ravel(), return_index=True)
    gone = np.ones(len(hashes), bool)
    gone[first] = False
    counts = {"documents in": len(hashes), "exact copies": int(gone.sum())}
    if mode == "near":
        near = _near(np.concatenate([p["minhash"] for p in parts]), gone, threshold)
        counts["near copies"] = int(near.sum())
        gone |= near
    return gone, counts | {"documents out": int((~gone).sum())}


def _near(minhash: np.ndarray, gone: np.ndarray, threshold: float) -> np.ndarray:
    """Documents at least `threshold` similar to an earlier one that stays."""
    near = np.zeros(len(minhash), bool)
    buckets: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    width = NUM_PERM // BANDS
    for i in np.flatnonzero(~gone).tolist():
        keys = [minhash[i, b * width : (b + 1) * width].tobytes() for b in range(BANDS)]
        met = {j for bucket, key in zip(buckets, keys, strict=True) for j in bucket.get(key, ())}
        if met and ((minhash[sorted(met)] == minhash[i]).mean(1) >= threshold).any():
            near[i] = True
            continue
        for bucket, key in zip(buckets, keys, strict=True):
            bucket.setdefault(key, []).append(i)
    return near


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with new_file(path) as out:
        write_all(out, buffer.getbuffer())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}
