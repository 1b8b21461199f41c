"""Every conversion algorithm against the preset's choice, one change at a time: SmolLM2-135M, same text.

    python benchmarks/algorithms.py WORK_FOLDER [--losses | --only WORD]

Writes benchmarks/results/migration/algorithms.json: loss and KL on held-out text, in nats per token, by domain. The arms of
`lightning` convert all layers but the MLA ones, which stay softmax attention; those of `mla` convert only these, from the
teacher, so that nothing else hides their damage; `all mla` makes every layer MLA, so that ranks have something to share. Arms
in `WARMED` are measured again after the preset's linear warm-up of WARMUP_TOKENS: a start says little about where training leads;
their seconds are those of the warm-up. With --losses: the first arm alone, warmed up after each of `LOSSES`, into losses.json;
with --only: the first arm and those whose names hold WORD, into algorithms-WORD.json.
Texts are tokenised once, into WORK_FOLDER/texts.safetensors.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import openling
from openling.config.migrate import preset
from openling.data.corpus import find_corpus, mixture
from openling.data.pack import Batches, cut_windows, tokenise
from openling.environment import write_results
from openling.migrate.convert import to_lightning, to_mla
from openling.migrate.layout import stage_kinds, target_config
from openling.migrate.measure import TeacherTrace, agreement
from openling.migrate.pipeline import WINDOWS_PER_BATCH
from openling.migrate.select import select_layers
from openling.migrate.touched import trainable
from openling.model.device import pick_device
from openling.model.ling import Ling
from openling.train.loop import train
from openling.weights.gguf import import_gguf, smollm2_gguf

RESULTS = Path(__file__).parent / "results" / "migration"
LENGTH, CALIBRATION_TOKENS, EVALUATION_TOKENS = 512, 32768, 16384
DOMAINS = ("python-docs", "kjv")
WARMUP_TOKENS = 1_000_000
WARMED = (
    "best",
    "heads in the teacher's order",
    "group norm and gate refitted",
    "layers selected by KL",
    "layers selected by reading near",
    "layers selected by local error",
)

# Changes of the warm-up's losses, by what they add to an arm's name.
LOSSES: dict[str, dict[str, float]] = {
    "": {},
    ", CE alone": {"kl": 0.0, "ce": 1.0},
    ", CE beside KL": {"ce": 1.0},
    ", alignment alone": {"kl": 0.0, "align": 1.0},
    ", alignment beside KL": {"align": 1.0},
    ", alignment beside KL, a tenth": {"align": 0.1},
}

# Changes of preset `best`: (what is converted, name, conversion, layout). Arms of MLA change `UNFOLDED`: what else they do
# is then not hidden by folds that adapt. The first of its kind is what the others stand beside.
UNFOLDED = {"rope_fold": 1}
ARMS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("lightning", "best", {}, {}),
    ("lightning", "new K/V heads random, gate too", {"kv_heads": "random"}, {}),
    ("lightning", "heads in the teacher's order", {"match_heads": False}, {}),
    ("lightning", "group norm refitted", {"refit_norm": True}, {}),
    ("lightning", "group norm and gate refitted", {"refit_gate": True}, {}),
    ("lightning", "output not refitted", {"refit_output": False}, {}),
    ("lightning", "output not refitted, group norm refitted", {"refit_output": False, "refit_norm": True}, {}),
    ("lightning", "output not refitted, norm and gate refitted", {"refit_output": False, "refit_gate": True}, {}),
    ("lightning", "layers selected by KL", {"layer_score": "kl"}, {"mla_layers": "selected"}),
    ("lightning", "layers selected by reading near", {"layer_score": "near"}, {"mla_layers": "selected"}),
    ("lightning", "layers selected by local error", {"layer_score": "local"}, {"mla_layers": "selected"}),
    ("lightning", "ratio 1:1", {}, {"group_size": 2}),
    ("lightning", "ratio 2:1", {}, {"group_size": 3}),
    ("lightning", "ratio 1:1, selected by KL", {"layer_score": "kl"}, {"group_size": 2, "mla_layers": "selected"}),
    ("lightning", "ratio 14:1", {}, {"group_size": 15}),
    ("lightning", "ratio 14:1, selected by KL", {"layer_score": "kl"}, {"group_size": 15, "mla_layers": "selected"}),
    ("lightning", "pure linear", {}, {"mla_layers": "none"}),
    ("mla", "frequencies not folded", {}, {}),
    ("mla", "output not refitted", {"refit_output": False}, {}),
    ("mla", "tokens count alike", {"attention_weighted": False}, {}),
    ("mla", "output refitted with damping 1e-3", {"mla_damping": 1e-3}, {}),
    ("mla", "rotated key by key energy alone", {"query_weighted_rope": False}, {}),
    ("mla", "frequencies folded by 2", {"rope_fold": 2}, {}),
    ("mla", "frequencies folded by 4", {"rope_fold": 4}, {}),
    ("mla", "frequencies folded as measured", {"rope_fold": "auto"}, {}),
    ("mla", "folded by 4, key energy alone", {"rope_fold": 4, "query_weighted_rope": False}, {}),
    ("mla", "folded as measured, key energy alone", {"rope_fold": "auto", "query_weighted_rope": False}, {}),
    ("mla", "balance by norms", {"balance": "ratio"}, {}),
    ("mla", "latent norms E[1/rms]", {"latent_norm": "inverse"}, {}),
    ("mla", "latent norms E[rms]", {"latent_norm": "rms"}, {}),
    ("mla", "latent norms by channel", {"latent_norm": "channel"}, {}),
    ("all mla", "frequencies not folded", {}, {}),
    ("all mla", "frequencies folded as measured", {"rope_fold": "auto"}, {}),
    ("all mla", "rank 128 in every layer", {}, {"kv_lora_rank": 128}),
    ("all mla", "rank 128 on average, at most 192", {"kv_rank_budget": 128}, {"kv_lora_rank": 192}),
    ("all mla", "rank 128 on average, at most 256", {"kv_rank_budget": 128}, {"kv_lora_rank": 256}),
    ("all mla", "rank 192 on average, at most 256", {"kv_rank_budget": 192}, {"kv_lora_rank": 256}),
]


def texts(work: Path, tokenizer: Any, vocab_size: int) -> dict[str, torch.Tensor]:
    """Windows [N, T] of the training text, which begins with the calibration text, and of each domain's held-out text."""
    path = work / "texts.safetensors"
    if not path.exists():
        parts = [mixture(("python-docs", "python-code"), ["train", "train"])]
        parts += [find_corpus(name).documents("heldout" if name == "python-docs" else "all") for name in DOMAINS]
        found = {}
        for name, documents in zip(("training", *DOMAINS), parts, strict=True):
            most = WARMUP_TOKENS if name == "training" else EVALUATION_TOKENS
            tokens = tokenise(documents, tokenizer, vocab_size=vocab_size, max_tokens=most)[:most]
            found[name] = torch.from_numpy(cut_windows(tokens, LENGTH, where=name).astype(np.int64))
        save_file(found, path)
    return load_file(path)


def convert(teacher: Ling, what: str, conversion: dict[str, Any], layout: dict[str, Any], windows: list[torch.Tensor]) -> Ling:
    """The student of one arm."""
    options = preset("best").conversion.model_copy(update=UNFOLDED | conversion)
    target = target_config(teacher.config, **layout)
    how: dict[str, Any] = {"on_layer": lambda i: None, "bf16": True}
    if layout.get("mla_layers") == "selected":
        chosen = select_layers(teacher, target, windows, options, seed=0, bf16=True)
        print(f"  selected {chosen.layers}, scores {[round(s, 4) for s in chosen.scores]}", flush=True)
        target = target_config(teacher.config, **layout | {"mla_layers": chosen.layers})
    if what == "lightning":
        half = target.replace(layer_kinds=stage_kinds(teacher.config, target, "lightning"), mtp_layer_kind="gqa")
        return to_lightning(teacher, half, windows, options, seed=0, **how)[0]
    kinds = tuple("mla" if kind == "mla" or what == "all mla" else "gqa" for kind in target.layer_kinds)
    student, found = to_mla(teacher, target.replace(layer_kinds=kinds), windows, options, **how)
    told = [a for a in found.approximations if a.step in ("latent rank", "RoPE folding")]
    print("  " + ", ".join(f"{a.layer}: {a.measure} {a.value:.4g}" for a in told), flush=True)
    return student


def warm_up(start: Ling, teacher: Ling, windows: torch.Tensor, losses: dict[str, float]) -> Ling:
    """A copy of the student after the preset's linear warm-up, with other losses."""
    warmup, student = preset("best", tokens=WARMUP_TOKENS).linear_warmup, copy.deepcopy(start)
    config = warmup.train.model_copy(update=losses)
    batches = Batches(windows.numpy().astype(np.int32), batch_size=config.batch_size)
    names = trainable(student.config, "linear-warmup", warmup.trainable)
    with tempfile.TemporaryDirectory() as run:
        train(student, config, batches, parameters=names, run=Path(run), teacher=teacher if config.follows else None)
    return student.eval()


def row(name: str, what: str, domain: str, found: Any, peer: str, base: Any, seconds: float) -> dict[str, Any]:
    """One line of the results."""
    return {
        "name": f"{what}: {name}, {domain}",
        "value": found["loss"],
        "unit": "nats per token",
        "peer": f"{what}: {peer}",
        "peer_value": base["loss"],
        "ratio": found["loss"] / base["loss"],
        "goal": None,
        "met": None,
        "gap": found["gap"],
        "kl": found["kl"],
        "kl_of_peer": base["kl"],
        "top1": found["top1"],
        "seconds": seconds,
    }


def main() -> None:
    """Convert once per arm, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--losses", action="store_true", help="the losses of the warm-up alone")
    parser.add_argument("--only", metavar="WORD", help="the first arm and those whose names hold the word")
    args = parser.parse_args()
    losses_alone, work = args.losses, args.work
    arms = [arm for i, arm in enumerate(ARMS) if i == 0 or not args.losses and (args.only or "") in arm[1]]
    if not (work / "teacher").exists():
        import_gguf(smollm2_gguf(), work / "teacher")
    device = pick_device("auto")
    loaded = openling.load(work / "teacher", device=device)
    teacher = loaded.model.float()
    found = texts(work, loaded.tokenizer, teacher.config.vocab_size)
    training = found.pop("training")
    windows = list(training[: CALIBRATION_TOKENS // LENGTH].to(device).split(WINDOWS_PER_BATCH))
    traces = {domain: TeacherTrace.record(teacher, w, bf16=True) for domain, w in found.items()}
    rows: list[dict[str, Any]] = []
    base: dict[str, Any] = {}

    def measure(student: Ling, what: str, name: str, seconds: float) -> None:
        measured = {domain: agreement(student, traces[domain], w, bf16=True) for domain, w in found.items()}
        first, peer = base.setdefault(what, (name, measured))
        rows.extend(row(name, what, domain, m, first, peer[domain], seconds) for domain, m in measured.items())
        said = ", ".join(f"{domain} {m['loss']:.3f} kl {m['kl']:.3f}" for domain, m in measured.items())
        print(f"{what}: {name}: {said} [{seconds:.0f} s]", flush=True)

    for what, name, conversion, layout in arms:
        begun = time.monotonic()
        student = convert(teacher, what, conversion, layout, windows)
        measure(student, what, name, time.monotonic() - begun)
        if what == "lightning" and name in WARMED:
            for added, losses in LOSSES.items() if losses_alone else [("", LOSSES[""])]:
                begun = time.monotonic()
                warmed = warm_up(student, teacher, training, losses)
                measure(warmed, "lightning, warmed up", name + added, time.monotonic() - begun)
    file = "losses" if losses_alone else f"algorithms-{args.only}" if args.only else "algorithms"
    write_results(RESULTS / f"{file}.json", shlex.join(["python", *sys.argv]).replace(str(work), "WORK_FOLDER"), rows)


if __name__ == "__main__":
    main()
