"""What each removal of QK-norm costs in nats, on a trained teacher that has the norm.

    python benchmarks/qk_norm.py TEACHER WORK_FOLDER

TEACHER is a GQA checkpoint with QK-norm and no biases (benchmarks/moe_teacher.py makes one). Writes
benchmarks/results/migration/qk-norm.json: nats per token above the teacher, loss and KL, by domain. Arms of `removal alone`
keep softmax attention and lose the norm, nothing else: no rank, no rotated dims, no refit. They are run on several calibration
texts. Arms of `MLA` are whole conversions by preset `best`, so that a better removal also has to survive what follows it.
"""

from __future__ import annotations

import copy
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from algorithms import CALIBRATION_TOKENS, DOMAINS, LENGTH, RESULTS, convert, texts

import openling
from openling.config.migrate import preset
from openling.environment import write_results
from openling.migrate.calibrate import walk
from openling.migrate.convert import without_qk_norm
from openling.migrate.measure import TeacherTrace, agreement
from openling.migrate.pipeline import WINDOWS_PER_BATCH
from openling.migrate.qknorm import REMOVALS
from openling.model.device import pick_device
from openling.model.ling import GroupedQueryAttention, Ling

PEER = "pooled"
CALIBRATION_TEXTS = 3
GOAL = "at most half of pooled's nats"
UNIT = "nats per token above the teacher"
METHODS: tuple[Literal["pooled", "scalar", "ridge", "best"], ...] = (*REMOVALS, "best")


@torch.no_grad()
def without_norm(teacher: Ling, layers: range, windows: list[torch.Tensor], method: str) -> tuple[Ling, list[str]]:
    """The teacher with the norm of some layers folded into their projections; each layer is fitted on what the ones before it
    have made of the text. And which method each layer took, for queries and keys."""
    options = preset("best").conversion.model_copy(update={"qk_norm_removal": method})
    student, taken = copy.deepcopy(teacher), []
    for step in walk(teacher, student, windows, bf16=False):
        old, new = step.teacher.attention, step.student.attention
        if step.index not in layers:
            continue
        assert isinstance(old, GroupedQueryAttention)
        assert isinstance(new, GroupedQueryAttention)
        inputs = step.mixer_inputs(lambda x: F.pad(x.flatten(0, 1).double(), (0, 1)))  # no bias: its input is 0
        weights, errors = without_qk_norm(old, inputs, options)
        rows = torch.cat((weights.q, weights.k, weights.v)).flatten(0, 1)
        new.query_key_value.weight.copy_(rows[:, :-1])
        new.qk_norm = False
        taken.append(f"{step.index}: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    return student, taken


def row(what: str, method: str, domain: str, found: Any, peer: Any, goal: bool, **more: Any) -> dict[str, Any]:
    """One line of the results; `goal`: the goal is about these nats."""
    ratio = found["gap"] / peer["gap"]
    asked = goal and method != PEER
    return {
        "name": f"{what}: {method}, {domain}",
        "value": found["gap"],
        "unit": UNIT,
        "peer": f"{what}: {PEER}",
        "peer_value": peer["gap"],
        "ratio": ratio,
        "goal": GOAL if asked else None,
        "met": ratio <= 0.5 if asked else None,
        "kl": found["kl"],
        "kl_of_peer": peer["kl"],
        **{key: found[key] for key in ("loss", "gap_stderr", "top1", "tokens") if key in found},
        **more,
    }


def summary(what: str, method: str, domain: str, runs: list[Any], peers: list[Any]) -> dict[str, Any]:
    """Means over the calibration texts, and how far these are apart."""
    mean, peer = ({key: statistics.fmean(run[key] for run in both) for key in ("gap", "kl", "loss")} for both in (runs, peers))
    spread = [f([run["gap"] for run in runs]) for f in (min, max)]
    ratios = [run["gap"] / other["gap"] for run, other in zip(runs, peers, strict=True)]
    return row(f"{what}, mean of {len(runs)} texts", method, domain, mean, peer, True, spread=spread, ratios=ratios)


def main() -> None:
    """Remove, convert, measure, write the results."""
    source, work = Path(sys.argv[1]), Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto")
    loaded = openling.load(source, device=device)
    teacher = loaded.model.float()
    held_out = texts(work, loaded.tokenizer, teacher.config.vocab_size)
    training = held_out.pop("training").to(device)
    traces = {domain: TeacherTrace.record(teacher, held_out[domain]) for domain in DOMAINS}
    count = CALIBRATION_TOKENS // LENGTH
    last = teacher.config.num_hidden_layers - 1
    alone = {"removal alone, every layer": range(last + 1), "removal alone, last layer": range(last, last + 1)}
    rows: list[dict[str, Any]] = []
    runs: dict[tuple[str, str, str], list[Any]] = {}
    said = shlex.join(["python", *sys.argv]).replace(str(source), "TEACHER").replace(str(work), "WORK_FOLDER")

    def measure(student: Ling, what: str, method: str, **more: Any) -> None:
        for domain in DOMAINS:
            found = agreement(student, traces[domain], held_out[domain])
            runs.setdefault((what, method, domain), []).append(found)
            peer = runs[what, PEER, domain][-1]
            rows.append(row(what, method, domain, found, peer, what in alone, **more))
            print(f"{rows[-1]['name']}: {found['gap']:.4f}, kl {found['kl']:.4f}, ratio {rows[-1]['ratio']:.3f}", flush=True)

    for text in range(CALIBRATION_TEXTS):
        windows = list(training[text * count : (text + 1) * count].split(WINDOWS_PER_BATCH))
        for method in METHODS:
            for what, layers in alone.items():
                student, taken = without_norm(teacher, layers, windows, method)
                measure(student, what, method, calibration_text=text, layers=taken)
            if text == 0:
                for what, kinds in {"MLA, every layer": "all mla", "MLA, last layer": "mla"}.items():
                    conversion = {"qk_norm_removal": method, "rope_fold": "auto"}  # `convert` changes the fold, `best` does not
                    measure(convert(teacher, kinds, conversion, {}, windows), what, method, calibration_text=text)
        means = [
            summary(what, method, domain, found, runs[what, PEER, domain])
            for (what, method, domain), found in runs.items()
            if what in alone
        ]
        write_results(RESULTS / "qk-norm.json", said, rows + means)


if __name__ == "__main__":
    main()
