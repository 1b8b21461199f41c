"""`openling verify SOURCE OUT`: what can be checked of a finished conversion from the two folders alone.

Bytes are compared piece by piece, so memory does not depend on the model; files that are links to the source's are known to be
the same and not read. A check that cannot be made says why (`not run`), and never counts as passed.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openling.errors import UserError
from openling.migrate.lightning import replicate
from openling.model.config import LING_ARCHITECTURE
from openling.weights.files import MANIFEST, Kept, file_hash, first_difference, identity
from openling.weights.folder import EMBEDDINGS, LM_HEAD, Opened, open_folder, read_binding
from openling.weights.fp8 import Dequantised
from openling.weights.io import read_json
from openling.weights.linked import kept_tensors
from openling.weights.names import Binding, bind

CPU = torch.device("cpu")
Outcome = Literal["ok", "wrong", "not run"]


@dataclass(frozen=True)
class Check:
    """One check, and what was found: counts, or the first thing that is wrong."""

    name: str
    outcome: Outcome
    found: str


def verify(source: Path, out: Path) -> list[Check]:
    """Every check of `out` against `source`; a UserError where one of them is no readable checkpoint folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* tensors are rounded to ")  # by who computes: here bytes are compared
        old, new = open_folder(source), open_folder(out)  # names, shapes, index and config of both agree from here on
    _check_same_model(old, new)
    tensors = len(new.raw.names())
    checks = [Check("index, headers, config", "ok", f"{tensors:,} tensors of {', '.join(sorted(set(new.config.layer_kinds)))}")]
    manifest = read_json(out / MANIFEST) if (out / MANIFEST).exists() else None
    checks.append(_source_unchanged(source, manifest))
    checks.append(_files(out, manifest))
    checks.append(_untouched(old, new, manifest))
    checks.append(_rewritten(old, new))
    checks.append(_lightning_heads(old, new, manifest))
    return checks


def _source_unchanged(source: Path, manifest: dict[str, Any] | None) -> Check:
    name = "source as it was converted"
    if manifest is None:
        return Check(name, "not run", f"OUT has no {MANIFEST}")
    for shard, before in manifest["shards"].items():
        path = source / shard
        now = identity(path) if path.exists() else {"bytes": "absent"}
        if any(now.get(key) != before[key] for key in ("bytes", "samples")):
            return Check(name, "wrong", f"{shard}: now {now['bytes']} bytes, then {before['bytes']}; its blocks differ")
    before = manifest.get("settings", {}).get("config.json")
    if before is not None and file_hash(source / "config.json") != before:
        return Check(name, "wrong", f"config.json: its sha256 is no longer {before[:16]}...")
    return Check(name, "ok", f"{len(manifest['shards'])} shards (size and blocks all over each), config.json")


def _files(out: Path, manifest: dict[str, Any] | None) -> Check:
    """Sizes and hashes that the manifest holds; of links it holds sizes alone."""
    name = "files as they were written"
    if manifest is None:
        return Check(name, "not run", f"OUT has no {MANIFEST}")
    linked = 0
    for file, about in manifest["files"].items():
        path = out / file
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            return Check(name, "wrong", f"{file}: {path.stat().st_size if path.is_file() else 'no'} bytes, not {about['bytes']}")
        if about["sha256"] is None:
            linked += 1
        elif file_hash(path) != about["sha256"]:
            return Check(name, "wrong", f"{file}: its sha256 is no longer {about['sha256'][:16]}...")
    hashes = f"{len(manifest['files']) - linked} hashes, {linked} links"
    if "config.json" not in manifest["files"]:
        return Check(name, "ok", f"{hashes}, of weights alone: {MANIFEST} has none of config.json and other small files")
    return Check(name, "ok", f"{hashes}: all files but README.md")


def _changed(old: Opened, new: Opened) -> list[int]:
    count = new.config.num_hidden_layers + new.config.num_nextn_predict_layers
    return [i for i in range(count) if old.config.layer_kind(i) != new.config.layer_kind(i)]


def _old_bindings(old: Opened) -> dict[str, Binding]:
    return {LM_HEAD: old.bindings[EMBEDDINGS]} | old.bindings  # tied in the source, written out in the hybrid


def _kept_names(old: Opened, new: Opened) -> list[str]:
    """Our names of what is no mixer of a layer that changed kind."""
    fitted = tuple(f"model.layers.{i}.attention." for i in _changed(old, new))
    return [n for n in new.shapes if not n.startswith(fitted) and n in new.bindings]


def _check_same_model(old: Opened, new: Opened) -> None:
    """Raise a UserError where the hybrid cannot have been made of this source."""
    theirs, layers = _old_bindings(old), [opened.config.num_hidden_layers for opened in (old, new)]
    other = (n for n in _kept_names(old, new) if n not in theirs or old.shapes.get(n, new.shapes[n]) != new.shapes[n])
    found = f"{layers[0]} layers, not {layers[1]}" if layers[0] != layers[1] else next(other, None)
    if found is not None:
        raise UserError("OUT was made of another model", where=old.folder, value=found, expected=f"the source of {new.folder}")


def _difference(tensor: Kept, old: Opened, new: Opened, *, strict: bool) -> str | None:
    """What differs from the source's bytes; unless `strict`, of a tensor of another type from its values in that type."""
    name, ours, theirs = tensor.name, new.raw, old.raw
    if strict or name not in ours or ours.dtype(name) == theirs.dtype(tensor.pieces[0]):
        return first_difference(tensor, ours, theirs)
    found = ours.read(name)
    expected = torch.cat([old.reader.read(piece) for piece in tensor.pieces]).to(found.dtype)
    same = found.shape == expected.shape and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    return None if same else f"its values, as {found.dtype}, differ"


def _untouched(old: Opened, new: Opened, manifest: dict[str, Any] | None) -> Check:
    name, about = "untouched tensors identical", manifest or {}
    # A conversion from folder to folder, which notes its settings, trains nothing; who else says nothing may have trained mixers.
    patterns = about.get("trained", [] if "settings" in about else None)
    names = _kept_names(old, new)
    trained = {n for n in names if any(re.search(pattern, n) for pattern in patterns or ())}
    bindings = bind(LING_ARCHITECTURE, new.config, [n for n in names if n not in trained], present=new.reader)
    kept = kept_tensors(_old_bindings(old), bindings, old.reader if isinstance(new.reader, Dequantised) else old.raw)
    total, unsure = 0, None
    for tensor in kept:
        wrong = _difference(tensor, old, new, strict="settings" in about)
        if wrong and patterns is None and ".attention." in tensor.name:
            unsure = unsure or f"{tensor.name}: {wrong}; {MANIFEST} does not say whether it was trained"
        elif wrong:
            return Check(name, "wrong", f"{tensor.name}: {wrong}")
        total += new.raw.nbytes(tensor.name)
    if unsure:
        return Check(name, "not run", unsure)
    said = f"; {len(trained):,} left out, which were trained" if trained else ""
    return Check(name, "ok", f"{len(kept):,} tensors, {total / 1e9:.3f} GB{said}")


def _rewritten(old: Opened, new: Opened) -> Check:
    """Presence and shapes are known from the headers; here: finite, and not left empty."""
    changed, count = _changed(old, new), 0
    for i in changed:
        dead = _dead(old, i)
        for name in (n for n in new.bindings if n.startswith(f"model.layers.{i}.attention.")):
            tensor = read_binding(new, name, new.shapes[name], CPU)  # refuses NaN and infinities
            count += 1
            if tensor.dim() == 2 and not tensor.any() and not name.endswith("g_proj.weight") and not dead:
                return Check("rewritten tensors present", "wrong", f"{name} is all zero")
    return Check("rewritten tensors present", "ok", f"{count} tensors of {len(changed)} layers, finite, shapes as in config.json")


def _dead(old: Opened, layer: int) -> bool:
    """Whether a projection of the source's mixer is all zero, as one of the new mixer then may be."""
    if old.config.layer_kind(layer) != "gqa":
        return False
    prefix = f"model.layers.{layer}.attention."
    packed, dense = (
        read_binding(old, n, old.shapes[n], CPU) for n in (prefix + "query_key_value.weight", prefix + "dense.weight")
    )
    heads = (old.config.num_attention_heads, old.config.num_key_value_heads, old.config.num_key_value_heads)
    parts = packed.unflatten(0, (sum(heads), -1)).split(heads)
    return not all(part.any() for part in (*parts, dense))


def _lightning_heads(old: Opened, new: Opened, manifest: dict[str, Any] | None) -> Check:
    """Exact by construction: every Lightning head is a teacher's head, with the K and V that this head read."""
    name = "Lightning heads are the source's"
    layers = [i for i in _changed(old, new) if new.config.layer_kind(i) == "lightning"]
    if not layers:
        return Check(name, "not run", "no layer became Lightning")
    if isinstance(old.reader, Dequantised):
        return Check(name, "not run", "FP8: heads are quantised anew, not exact")
    for i in layers:
        wrong = _head_order(old, new, i)
        if wrong:
            why = _why_not_exact(manifest)
            return Check(name, "not run" if why else "wrong", f"layer {i}: {wrong}" + (f"; {why}" if why else ""))
    return Check(name, "ok", f"{len(layers)} layers: q, k, v, QK-norm are a joint permutation of replicated heads, bit for bit")


def _why_not_exact(manifest: dict[str, Any] | None) -> str | None:
    """Why other heads than the source's are no mistake, or None where they are one."""
    if manifest is None:
        return f"OUT has no {MANIFEST}, which tells whether they may differ"
    if "settings" not in manifest:
        return "trained since, or with random K/V heads: not exact"
    return None if manifest["settings"]["conversion"]["kv_heads"] == "replicate" else "with random K/V heads: not exact"


def _head_order(old: Opened, new: Opened, layer: int) -> str | None:
    prefix, c = f"model.layers.{layer}.attention.", old.config

    def read(opened: Opened, name: str) -> Tensor:
        return read_binding(opened, prefix + name, opened.shapes[prefix + name], CPU, old.stored)

    q, k, v = (
        read(old, "query_key_value.weight")
        .unflatten(0, (-1, c.head_dim))
        .split((c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads))
    )
    k, v = replicate(k, c.num_attention_heads), replicate(v, c.num_attention_heads)
    found = read(new, "query_key_value.weight").unflatten(0, (3, c.num_attention_heads, c.head_dim))
    left = set(range(c.num_attention_heads))
    for head in range(c.num_attention_heads):
        wanted = found[:, head]
        match = next((h for h in left if all(map(torch.equal, wanted, (q[h], k[h], v[h])))), None)
        if match is None:
            return f"head {head} is none of the source's"
        left.remove(match)
    norms = [n for n in ("query_layernorm.weight", "key_layernorm.weight") if prefix + n in old.bindings]
    return next((f"{n} differs" for n in norms if not torch.equal(read(old, n), read(new, n))), None)


def as_json(checks: list[Check]) -> str:
    """For other programs."""
    return json.dumps([{"check": c.name, "outcome": c.outcome, "found": c.found} for c in checks], indent=1)
