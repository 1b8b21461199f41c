"""MLA at equal cache against TransMLA's converter: SmolLM2-135M-Instruct, every layer, same texts, no training.

    python benchmarks/transmla.py TRANSMLA SmolLM2-135M-Instruct

TRANSMLA is a checkout of github.com/fxmeng/TransMLA, whose code converts as its own converter.py calls it, FP32, fold `auto`,
collapse and balance as by default; SmolLM2-135M-Instruct is the teacher's folder. Both read the same 32 K tokens for calibration.
Its search for the fold goes by the perplexity of a text that is measured in the end, the held-out python-docs, as its converter's
does. Queries are not compressed: that is its default, and no cache. Its latents have no norm unless `--use-qkv-norm` is given;
ours always have one, as stock engines ask.

Writes benchmarks/results/migration/transmla.json after every text of an arm and leaves out what is there: delete it to
measure anew. A third argument, `theirs` or `ours`, measures one side; the two may run at the same time.
"""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import openling
from openling.config.migrate import Text, preset
from openling.environment import write_results
from openling.migrate.convert import to_mla
from openling.migrate.layout import target_config
from openling.migrate.measure import TeacherTrace, agreement
from openling.migrate.pipeline import WINDOWS_PER_BATCH
from openling.migrate.texts import evaluation_windows, training_tokens
from openling.model.ling import Ling

RESULTS = Path(__file__).parent / "results" / "migration" / "transmla.json"
TEXT = Text()
# (latent rank, rotated dims); numbers per token and layer are their sum, 192, 144 and 96 of the teacher's 384.
WIDE, NARROW = ((128, 64), (80, 64), (32, 64)), (64, 32)
# One search for the fold serves all arms of as many rotated dims that follow one another.
THEIRS = [("as by default", split) for split in WIDE] + [("with latent norms", WIDE[0]), ("as by default", NARROW)]
OURS = [("best", split) for split in (*WIDE, NARROW)] + [("paper", split) for split in WIDE]
GOAL = "no worse than TransMLA at equal cache"
Row = dict[str, Any]


class Peer:
    """TransMLA's converter, in parts: what depends on the rotated dims alone is done once for all ranks."""

    def __init__(self, checkout: Path, folder: Path, calibration: Tensor, search: Tensor) -> None:
        sys.path.insert(0, str(checkout / "transmla" / "transmla"))
        # Read for names in annotations only: the texts are ours.
        sys.modules.setdefault("datasets", ModuleType("datasets")).__dict__.update(Dataset=object, DatasetDict=object)
        import lora_qkv
        import partial_rope

        for mixer in (partial_rope.PartialRope, lora_qkv.LoraQKV):
            mixer.forward = _known_arguments(mixer.forward)
        self._partial_rope, self._low_rank_qkv = partial_rope.partial_rope, lora_qkv.low_rank_qkv
        self.folder, self.commit = folder, _commit(checkout)
        # Without logits that nobody reads; batches as by its defaults.
        self._calibration, self._search = _loader(calibration, 8, logits_to_keep=1), _loader(search, 2)
        self._tokenizer = SimpleNamespace(pad_token_id=None)
        self._rotated: tuple[int, Any, int] = (0, None, 0)

    def convert(self, rank: int, rope: int, *, norm: bool) -> tuple[Any, int]:
        """The converted model and the fold that was chosen."""
        if self._rotated[0] != rope:
            teacher = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="sdpa").eval()
            how = {"freqfold": "auto", "collapse": teacher.config.head_dim // rope}
            found = self._partial_rope(teacher, self._tokenizer, self._calibration, self._search, **how)
            self._rotated = (rope, *found)
        model, fold = deepcopy(self._rotated[1]), self._rotated[2]
        ranks = {"qk_mqa_dim": rope, "collapse": model.config.head_dim // rope, "kv_lora_rank": rank}
        how = {"q_lora_rank": None, "balance_kv_ratio": 1, "use_qkv_norm": norm}
        return self._low_rank_qkv(model, self._tokenizer, self._calibration, None, **ranks, **how), fold


def _loader(windows: Tensor, batch: int, **more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more for ids in windows.split(batch)]


def _known_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that lets those arguments pass by which later versions of transformers give besides."""
    names = set(inspect.signature(forward).parameters)
    return lambda self, **given: forward(self, **{name: value for name, value in given.items() if name in names})


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def as_student(model: Any) -> Any:
    """A model of transformers with the two things that `agreement` asks of a student."""
    return SimpleNamespace(lm_head=model.lm_head, model=lambda ids: model.model(input_ids=ids, use_cache=False).last_hidden_state)


def convert(teacher: Ling, name: str, calibration: Tensor, rank: int, rope: int) -> Ling:
    """Our MLA conversion alone, of every layer, with a preset's choices."""
    layers = teacher.config.num_hidden_layers
    target = target_config(teacher.config, kv_lora_rank=rank, qk_rope_head_dim=rope)
    target = target.replace(layer_kinds=("mla",) * layers, layer_group_size=1, q_lora_rank=None)
    windows = list(calibration.split(WINDOWS_PER_BATCH))
    return to_mla(teacher, target, windows, preset(name).conversion, on_layer=lambda i: None, bf16=True)[0]


def keep(row: Row, command: str) -> None:
    """Add an arm to the results, and set every one of ours beside theirs of the same split."""
    rows = [*arms_kept(), row]
    theirs = {(r["text"], r["split"]): r for r in rows if r["side"] == "theirs" and r["arm"] == "as by default"}
    for r in rows:
        if r["side"] == "ours" and (peer := theirs.get((r["text"], r["split"]))):
            goal = GOAL if r["arm"] == "best" else None
            r |= {"peer": peer["name"], "peer_value": peer["value"], "ratio": r["value"] / peer["value"], "goal": goal}
            r |= {"met": r["value"] <= peer["value"] if goal else None, "peer_gap": peer["gap"], "peer_kl": peer["kl"]}
    write_results(RESULTS, command, rows)


def arms_kept() -> list[Row]:
    """The rows that stand in the results file."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main() -> None:
    """Convert once per arm, write the results."""
    checkout, folder = map(Path, sys.argv[1:3])
    sides = sys.argv[3:] or ["theirs", "ours"]
    loaded = openling.load(folder, device=torch.device("cpu"))
    teacher, size = loaded.model.float(), loaded.model.config.vocab_size
    tokens = training_tokens(TEXT, loaded.tokenizer, vocab_size=size, max_tokens=TEXT.calibration_tokens)
    calibration = torch.from_numpy(tokens).long().view(-1, TEXT.sequence_length)
    held_out = evaluation_windows(TEXT, loaded.tokenizer, vocab_size=size)
    windows = {name: torch.from_numpy(w).long() for name, w in held_out.items()}
    traces = {name: TeacherTrace.record(teacher, w) for name, w in windows.items()}
    peer = Peer(checkout, folder, calibration, windows["python-docs"]) if "theirs" in sides else None
    arms = [(side, *arm) for side, listed in (("theirs", THEIRS), ("ours", OURS)) if side in sides for arm in listed]
    for side, arm, (rank, rope) in arms:
        split, told, begun = f"{rank} + {rope}", {}, time.monotonic()
        done = {r["text"] for r in arms_kept() if (r["side"], r["arm"], r["split"]) == (side, arm, split)}
        if done == windows.keys():
            continue
        if peer and side == "theirs":
            model, fold = peer.convert(rank, rope, norm=arm == "with latent norms")
            student, told = as_student(model), {"fold": fold, "commit of TransMLA": peer.commit}
        else:
            student = convert(teacher, arm, calibration, rank, rope)
        for text, w in windows.items():
            if text in done:
                continue
            found = agreement(student, traces[text], w)
            who = "TransMLA" if side == "theirs" else "openling"
            name = f"{rank + rope} numbers, {split}: {who}, {arm}, {text}"
            row = {"name": name, "value": found["loss"], "unit": "nats per token"}
            row |= {"side": side, "arm": arm, "split": split, "text": text, "gap": found["gap"], "kl": found["kl"]}
            row |= {"teacher": found["teacher_loss"], "top1": found["top1"], "seconds": time.monotonic() - begun} | told
            keep(row, shlex.join(["python", "benchmarks/transmla.py", "TRANSMLA", folder.name]))
            print(f"{row['name']}: gap {row['gap']:.4f} kl {row['kl']:.4f} [{row['seconds']:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
