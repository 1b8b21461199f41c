"""Every gate trips on a real tiny model made to trip it, is met again by whoever resumes, and lets through who says so."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import COMMON, SHAPE, Place, Result, byte_tokenizer, in_child, openling_command, weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from openling.commands.migrate import outline
from openling.config.migrate import Gates, preset
from openling.migrate import gates, measurer, pipeline
from openling.migrate.gates import broken_numbers, judge
from openling.report.page import build


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A teacher that knows its held-out text by heart: whatever is done to its attention shows at once."""
    return learn(tmp_path_factory.mktemp("learnt"), sure=4.0)


def learn(folder: Path, sure: float = 1.0, **changes: int) -> Place:
    """sure: what its logits are multiplied by, so that it stays sure of itself once damaged, on any machine."""
    text = (subprocess.__doc__ or "")[:600]
    for name in ("cal.txt", "eval.txt"):
        (folder / name).write_text(text)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **SHAPE | changes, **COMMON))
    model.save_pretrained(folder / "teacher")
    byte_tokenizer(folder / "teacher")
    tokens = AutoTokenizer.from_pretrained(folder / "teacher")(text)["input_ids"]
    ids = torch.tensor(tokens[:512]).view(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    for _ in range(110):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.lm_head.weight.data *= sure
    model.to(torch.bfloat16).save_pretrained(folder / "teacher")
    return Place(folder / "teacher", folder / "cal.txt", folder / "eval.txt")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and layers are measured; samples, needles and the page are not what is tested here."""
    monkeypatch.setattr(measurer, "sample_completions", lambda *a, **k: [])
    monkeypatch.setattr(measurer.Measurer, "_needle", lambda *a: [])
    monkeypatch.setattr("openling.report.build", lambda run: run / "report.html")
    monkeypatch.setattr("openling.report.summary_table", lambda report: "")


def migrate(place: Place, out: Path, *words: object, **changes: object) -> Result:
    return place.migrate(out, *words, **{"text.evaluation_tokens": 512} | changes)


def tripped(result: Result, gate: str, *parts: str) -> None:
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    for part in (f"outside its tolerance: {gate}", f"--resume --gates.{gate} ", "--gates.stop false", *parts):
        assert part in result.err


def grid(*found: int, n: int = 18) -> list[dict[str, Any]]:
    """Needles found of `n` at 128 tokens, at 256 and so on, as a report has them."""
    return [
        {"length": 128 << i, "exact": one / n, "token_accuracy": one / n, "n": n, "depths": []} for i, one in enumerate(found)
    ]


def verdicts(out: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Those of the report, which are those of the journal."""
    run = out.with_name(out.name + ".run")
    report = json.loads((run / "report.json").read_text())
    found = next(s["gates"] for s in report["stages"] if s["name"] == stage)
    assert found == json.loads((run / "journal.json").read_text())["gates"][stage]
    return {v["gate"]: v for v in found}


RECALL_SAID = "0.1944 of the needles lost (teacher 36 of 36, student 29 of 36, needles in 128, 256 tokens)"
RECALL_ERROR = f"""\
openling: stage linear-warmup is outside its tolerance: recall_drop
  where:    needles in 128, 256 tokens
  value:    {RECALL_SAID}
  expected: at most 0.1 of the needles lost
  next:     look at the report; to go on all the same: --resume --gates.recall_drop 0.2, \
or past every gate: --resume --gates.stop false
"""

# ---------------------------------------------------------------------------------------------------------------------
# Real runs
# ---------------------------------------------------------------------------------------------------------------------


def test_worse_than_guessing_stops_and_the_flag_goes_on(learnt: Place, tmp_path: Path) -> None:
    """The Lightning gate: killed in it, met again, met once more, passed by its flag; the weights are those of one go."""
    out, words = tmp_path / "out", ("--stage", "lightning")

    def die() -> int:
        with pytest.MonkeyPatch.context() as patch:
            judged = gates.judge

            def killed(stage: dict[str, Any], *args: Any, **how: Any) -> Any:
                if stage["name"] == "lightning":
                    os.kill(os.getpid(), signal.SIGKILL)
                return judged(stage, *args, **how)

            patch.setattr(gates, "judge", killed)
            return migrate(learnt, out, *words).code

    assert in_child(die) == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(pipeline, "to_lightning")  # nothing is done again
        tripped(migrate(learnt, out, *words, "--resume"), "lightning_loss", "eval.txt", "at most 1 x the loss of guessing")
        assert not out.exists()
        tripped(migrate(learnt, out, *words, "--resume"), "lightning_loss")
        assert "Stopped at a gate. Lightning conversion" in build(tmp_path / "out.run").read_text()
        value = verdicts(out, "lightning")["lightning_loss"]["value"]
        assert value > 1
        tripped(migrate(learnt, out, *words, "--resume", **{"gates.lightning_loss": value - 0.01}), "lightning_loss")
        result = migrate(learnt, out, *words, "--resume", **{"gates.lightning_loss": value + 0.01})
    assert result.code == 0, result.err
    assert "let through" in result.err
    found = verdicts(out, "lightning")["lightning_loss"]
    assert (found["outcome"], found["standard"], found["text"]) == ("let through", 1.0, "eval.txt")
    assert found["limit"] == value + 0.01
    assert migrate(learnt, tmp_path / "regardless", *words, "--gates.stop", "false").code == 0
    assert weights(out) == weights(tmp_path / "regardless")


def test_what_the_journal_let_through_is_not_asked_again(learnt: Place, tmp_path: Path) -> None:
    calm = ("--linear_warmup.train.lr", "1e-6")  # four steps of a larger one may help or harm, as the processor rounds
    out, words = tmp_path / "out", ("--stages", "lightning,linear-warmup", *calm)
    tripped(migrate(learnt, out, *words), "lightning_loss")

    def die() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
            return migrate(learnt, out, *words, "--resume", **{"gates.lightning_loss": "null"}).code

    assert in_child(die) == -signal.SIGKILL
    result = migrate(learnt, out, *words, "--resume")
    assert result.code == 0, result.err
    assert verdicts(out, "lightning")["lightning_loss"]["outcome"] == "let through"
    assert verdicts(out, "linear-warmup")["warmup_rise"]["outcome"] == "passed"
    assert verdicts(out, "linear-warmup")["final_gap"]["outcome"] == "off"
    # The source of a single stage is measured, so that a warm-up has a start to be held against.
    wild = {"linear_warmup.train.lr": 3, "linear_warmup.train.warmup_steps": 0}
    one = ["--stage", "linear-warmup", "--teacher", learnt.teacher]
    result = learnt.migrate(tmp_path / "wild", *one, model=out, **{"text.evaluation_tokens": 512} | wild)
    tripped(result, "warmup_rise", "at most 0.02 nats", "nats (from ")
    report = json.loads((tmp_path / "wild.run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "source", "linear-warmup"]
    losses = [stage["domains"]["eval.txt"]["loss"] for stage in report["stages"]]
    assert verdicts(tmp_path / "wild", "linear-warmup")["warmup_rise"]["value"] == pytest.approx(losses[2] - losses[1])


def test_an_mla_conversion_that_costs_too_much(learnt: Place, tmp_path: Path) -> None:
    out, poor = tmp_path / "out", {"layout.kv_lora_rank": 2, "layout.q_lora_rank": 2}
    tripped(migrate(learnt, out, "--stage", "mla", **poor), "mla_step", "eval.txt", "at most 0.515 nats")
    result = migrate(learnt, out, "--stage", "mla", "--resume", **poor, **{"gates.stop": "false"})
    assert result.code == 0, result.err
    assert "gate mla_step" in result.err
    assert verdicts(out, "mla")["mla_step"]["outcome"] == "let through"
    result = migrate(learnt, tmp_path / "strict", "--stage", "mla", **{"gates.final_gap": 0, "gates.mla_step": "null"})
    tripped(result, "final_gap", "against")


@pytest.fixture(scope="module")
def one_head(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same with one K/V head, whose conversions cost little: what a tiny model knows by heart hangs on every head it has."""
    return learn(tmp_path_factory.mktemp("one_head"), num_key_value_heads=1)


def test_right_conversions_pass(one_head: Place, tmp_path: Path) -> None:
    rooms = {"lightning": {"lightning_loss": 0.8, "layer_error": 1.5}, "mla": {"mla_step": 0.3, "layer_error": 1.5}}
    for stage, room in rooms.items():
        assert migrate(one_head, tmp_path / stage, "--stage", stage, **{"gates.layer_error": 1.5}).code == 0
        found = verdicts(tmp_path / stage, stage)
        for gate, most in room.items():
            assert found[gate]["outcome"] == "passed"
            assert found[gate]["value"] < most


@pytest.mark.parametrize(("stage", "damage"), [("mla", "turned"), ("mla", "shuffled"), ("lightning", "turned")])
def test_one_damaged_layer_stops(stage: str, damage: str, one_head: Place, tmp_path: Path) -> None:
    """Whatever the loss says: the layer is seen, or those after it that read what it wrote."""
    function = f"to_{stage}"
    right = getattr(pipeline, function)

    @torch.no_grad()
    def wrong(*args: Any, **how: Any) -> Any:
        student, found = right(*args, **how)
        output = student.model.layers[2].attention.dense.weight
        output.copy_({"turned": -output, "shuffled": output.roll(1, 0)}[damage])
        return student, found

    limits = {"gates.mla_step": "null", "gates.lightning_loss": "null", "gates.layer_error": 1.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, function, wrong)
        result = migrate(one_head, tmp_path / "out", "--stage", stage, **limits)
    tripped(result, "layer_error", "layer ", "at most 1.5 x the teacher's squared output")


def test_numbers_that_overflow_stop_before_any_work(learnt: Place, tmp_path: Path) -> None:
    """Finite weights (others are refused when they are read), and logits that are not."""
    model = LlamaForCausalLM.from_pretrained(learnt.teacher)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight / model.lm_head.weight.abs().max() * 3e38)
    model.save_pretrained(tmp_path / "teacher")
    byte_tokenizer(tmp_path / "teacher")
    result = migrate(learnt, tmp_path / "out", model=tmp_path / "teacher")
    tripped(result, "finite", "stage teacher", "domains.eval.txt.loss", "--gates.finite false")
    assert not (tmp_path / "out.run" / "stages").exists()


def test_weights_that_their_dtype_cannot_hold(learnt: Place, tmp_path: Path) -> None:
    """In FP16 the refitted output projection overflows; the losses alone would not tell why."""
    model = LlamaForCausalLM.from_pretrained(learnt.teacher, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 5e4 / model.model.layers[0].self_attn.o_proj.weight.abs().max()
    model.half().save_pretrained(tmp_path / "teacher")
    byte_tokenizer(tmp_path / "teacher")
    result = openling_command("migrate", tmp_path / "teacher", tmp_path / "out", "--stage", "lightning", *learnt.flags())
    tripped(result, "finite", "model.layers.0.attention.dense.weight")
    words = ("--stage", "lightning", "--resume", "--gates.stop", "false")
    assert openling_command("migrate", tmp_path / "teacher", tmp_path / "out", *words, *learnt.flags()).code == 0
    assert verdicts(tmp_path / "out", "lightning")["finite"]["outcome"] == "let through"
    assert "model.layers.0.attention.dense.weight" in build(tmp_path / "out.run").read_text()  # losses and all that are NaN


def test_lost_recall_is_said_and_a_flag_makes_it_a_gate(learnt: Place, tmp_path: Path) -> None:
    """The warm-up is right and its loss is judged by another gate; the needles are 36 of 36, then 29, whatever is trained."""

    def needles(self: measurer.Measurer, student: Any, *_: Any) -> list[dict[str, Any]]:
        return grid(18, 18) if student is self.teacher else grid(15, 14)

    out, words = tmp_path / "out", ("--stages", "lightning,linear-warmup", "--linear_warmup.train.lr", "1e-6")
    passing = {"gates.lightning_loss": "null"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurer.Measurer, "_needle", needles)
        result = migrate(learnt, out, *words, **passing, **{"gates.recall_drop": 0.1})
        tripped(result, "recall_drop")
        assert result.err.endswith(RECALL_ERROR), result.err
        assert (verdicts(out, "linear-warmup")["recall_drop"]["outcome"], out.exists()) == ("stopped", False)
        assert migrate(learnt, out, *words, "--resume", **passing, **{"gates.recall_drop": 0.2}).code == 0
        assert verdicts(out, "linear-warmup")["recall_drop"]["outcome"] == "passed"
        result = migrate(learnt, tmp_path / "unguarded", *words, **passing)
    assert result.code == 0, result.err
    assert result.err.count(f"  warning: {RECALL_SAID}; no gate is set for it, --gates.recall_drop 0.05 would stop here\n") == 1
    assert verdicts(tmp_path / "unguarded", "linear-warmup")["recall_drop"]["outcome"] == "warned"
    page = build(tmp_path / "unguarded.run").read_text()
    assert "Worth a look, and no gate is set for it. linear warm-up: recall below the teacher&#39;s" in page


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def stage(name: str, **losses: float) -> dict[str, Any]:
    """Against a teacher of 2 nats."""
    domains = {text: {"loss": loss, "teacher_loss": 2.0, "gap": loss - 2} for text, loss in losses.items()}
    return {"name": name, "domains": domains}


def outcomes(one: dict[str, Any], before: dict[str, Any] | None, gates: Gates, *, last: bool = False) -> dict[str, str]:
    found = judge(one, before, gates, preset("best").gates, vocabulary=100, last=last)
    return {v.gate: v.outcome for v in found if v.gate not in ("finite", "layer_error")}


@pytest.mark.parametrize(
    ("settings", "loss", "expected"),
    [
        ({}, 4.60, "passed"),  # ln 100 = 4.605
        ({}, 4.61, "stopped"),
        ({}, math.nan, "stopped"),
        ({"stop": False}, 4.61, "let through"),
        ({"lightning_loss": 1.1}, 4.61, "let through"),
        ({"lightning_loss": 1.1}, 4.60, "passed"),
        ({"lightning_loss": 1.1}, 5.1, "stopped"),
        ({"lightning_loss": None}, 9.0, "let through"),
        ({"lightning_loss": 0.5}, 4.0, "stopped"),
    ],
)
def test_limits(settings: dict[str, Any], loss: float, expected: str) -> None:
    assert outcomes(stage("lightning", a=2.5, b=loss), None, Gates(**settings)) == {"lightning_loss": expected}


def test_a_gate_judges_the_worst_text_and_says_when_it_cannot() -> None:
    before, limits = stage("lightning", a=3.0, b=3.0), Gates(final_gap=1.0)
    found = judge(stage("mla", a=3.6, b=3.1), before, limits, limits, vocabulary=100, last=True)
    stopped = [(v.gate, v.text) for v in found if v.outcome == "stopped"]
    assert stopped == [("mla_step", "a"), ("final_gap", "a")]
    assert found[1].value == pytest.approx(0.6)
    unasked = {"recall_drop": "not judged"}
    assert outcomes(stage("mla-warmup", a=3.01), before, Gates()) == {"warmup_rise": "passed"} | unasked
    assert outcomes(stage("mla-warmup", a=3.03), before, Gates()) == {"warmup_rise": "stopped"} | unasked
    assert outcomes(stage("mla-warmup", c=3.0), before, Gates()) == {"warmup_rise": "not judged"} | unasked
    assert outcomes(stage("linear-warmup"), before, Gates(), last=True) == unasked | {
        "warmup_rise": "not judged",
        "final_gap": "not judged",
    }
    untrained = stage("lightning", a=9.0)
    untrained["domains"]["a"]["teacher_loss"] = 4.7
    assert outcomes(untrained, None, Gates()) == {"lightning_loss": "not judged"}
    assert outcomes(stage("teacher", a=2.0), None, Gates()) == {}


def recall(teacher: tuple[int, ...], student: tuple[int, ...], name: str = "linear-warmup", n: int = 20, **settings: Any) -> Any:
    """The verdict on needles found of `n` at each length."""
    limits, one = Gates(**settings), stage(name, a=2.5) | {"needle": grid(*student, n=n)}
    first = stage("teacher", a=2.0) | {"needle": grid(*teacher, n=n)}
    found = judge(one, None, limits, preset("best").gates, vocabulary=100, last=False, teacher=first)
    return {v.gate: v for v in found}.get("recall_drop")


@pytest.mark.parametrize("name", ["linear-warmup", "mla-warmup"])
@pytest.mark.parametrize(
    ("teacher", "student", "settings", "expected"),
    [
        ((20, 20), (20, 20), {}, "off"),
        ((20, 20), (19, 19), {}, "off"),  # 0.05 is not more than 0.05
        ((20, 20), (19, 18), {}, "warned"),
        ((20, 20), (0, 0), {"stop": False}, "warned"),
        ((19, 19), (0, 0), {}, "not judged"),  # 95 % are not more than 95 %
        ((20, 19), (0, 0), {}, "warned"),
        ((0, 0), (0, 0), {"recall_drop": 0}, "not judged"),
        ((), (20, 20), {"recall_drop": 0}, "not judged"),
        ((20, 20), (), {"recall_drop": 0}, "not judged"),
        ((20, 20), (20, 20), {"recall_drop": 0}, "passed"),
        ((20, 20), (20, 19), {"recall_drop": 0}, "stopped"),
        ((20, 19), (20, 20), {"recall_drop": 0}, "passed"),  # it finds more than its teacher
        ((20, 20), (19, 19), {"recall_drop": 0.05}, "passed"),
        ((20, 20), (20, 17), {"recall_drop": 0.05}, "stopped"),
        ((20, 20), (20, 10), {"recall_drop": 0.25}, "passed"),  # the whole grid counts, not its worst length
        ((20, 20), (20, 17), {"recall_drop": 0.05, "stop": False}, "let through"),
        ((20, 20, 20), (20, 19), {"recall_drop": 0.05}, "passed"),  # lengths that both were asked
    ],
)
def test_recall_limits(name: str, teacher: tuple[int, ...], student: tuple[int, ...], settings: Any, expected: str) -> None:
    assert recall(teacher, student, name, **settings).outcome == expected


def test_recall_is_said_in_needles_and_judged_after_warm_ups_alone() -> None:
    verdict = recall((20, 20), (9, 0), recall_drop=0.5)
    assert (verdict.value, verdict.unit, verdict.text) == (31 / 40, "of the needles lost", "needles in 128, 256 tokens")
    assert verdict.why == "teacher 40 of 40, student 9 of 40"
    assert recall((19, 19), (0, 0)).why == "the teacher itself finds 38 of 40 needles, not more than 95%"
    assert recall((), ()).why == "no needle was asked for"
    assert recall((20, 20), (0, 0), "lightning") is recall((20, 20), (0, 0), "mla") is None


def test_a_dry_run_names_the_limit_behind_both_warm_ups() -> None:
    ends = [line.rpartition("stops outside: ")[2] for line in outline(preset("best", gates=Gates(recall_drop=0.05)), Path("out"))]
    assert ends.count("warmup_rise 0.02, recall_drop 0.05, finite") == 2
    assert not any("recall_drop" in line for line in outline(preset("best"), Path("out")))


def test_a_limit_stops_just_what_lost_more() -> None:
    """Of every number of needles found: the limit itself passes, and so does what the message offers instead of it."""
    for asked in (18, 20, 60):
        for found in range(asked + 1):
            lost = asked - found
            assert recall((asked,), (found,), n=asked, recall_drop=lost / asked).outcome == "passed"
            if lost:
                stopped = recall((asked,), (found,), n=asked, recall_drop=(lost - 1) / asked)
                assert stopped.outcome == "stopped"
                offered = float(gates._wider(stopped))
                assert recall((asked,), (found,), n=asked, recall_drop=offered).outcome == "passed"
                assert offered <= lost / asked + 0.01


def test_the_worst_new_layer_counts_and_no_other() -> None:
    one = stage("mla", a=2.5)
    limits = Gates(layer_error=1.5)
    errors = (("gqa", 7.0), ("mla", 0.5), ("lightning", 9.0), ("mla", 1.6))
    one["layers"] = [{"layer": i, "kind": kind, "propagated": error} for i, (kind, error) in enumerate(errors)]
    found = {v.gate: v for v in judge(one, stage("x", a=2.5), limits, limits, vocabulary=100, last=False)}
    verdict = found["layer_error"]
    assert (verdict.outcome, verdict.text, verdict.value) == ("stopped", "layer 3", 1.6)
    one["domains"]["a"]["teacher_loss"] = 5.0
    found = {v.gate: v for v in judge(one, stage("x", a=2.5), limits, limits, vocabulary=100, last=False)}
    assert found["layer_error"].why == "the teacher itself is no better than guessing"


def test_paper_starts_where_the_paper_starts() -> None:
    limits = preset("paper").gates
    found = judge(stage("lightning", a=14.0), None, limits, limits, vocabulary=100, last=False)
    assert {v.gate: v.outcome for v in found} == {"finite": "passed", "lightning_loss": "off", "layer_error": "not judged"}


def test_every_number_is_looked_at() -> None:
    rows = [{"layer": i, "kind": "mla", "propagated": error} for i, error in enumerate((1.0, -math.inf))]
    measured = {"domains": {"a": {"loss": math.nan, "perplexity": math.inf, "teacher_loss": 1.0}}, "layers": rows}
    assert broken_numbers(measured) == ["domains.a.loss", "layers.1.propagated"]
    found = judge({"name": "mla", "nonfinite": ["w"], **measured}, None, Gates(), Gates(), vocabulary=9, last=False)[0]
    assert (found.outcome, found.value) == ("stopped", 3.0)
    assert "w, domains.a.loss, layers.1.propagated" in found.why


def test_a_resume_may_change_gates_and_nothing_else(learnt: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tripped(migrate(learnt, out, "--stage", "lightning"), "lightning_loss")
    changed = migrate(learnt, out, "--stage", "lightning", "--resume", **{"gates.stop": "false", "seed": 3})
    assert (changed.code, "--seed" in changed.err) == (2, True)
    shutil.rmtree(tmp_path / "out.run")
