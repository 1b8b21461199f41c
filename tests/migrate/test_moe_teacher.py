"""The benchmark's own teacher of Ling-2.0's shape and three arms on it, a few steps long."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import migration  # noqa: E402
import moe_teacher  # noqa: E402

from openling.migrate import measurer  # noqa: E402
from openling.weights.io import read_hf_config  # noqa: E402

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"intermediate_size": 32, "num_experts": 8, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
SMALL |= {"max_position_embeddings": 128}
TRAINING = {"train.precision": "fp32", "stages.short.mixture.length": 64, "stages.ling-moe.mixture.length": 128}
TRAINING |= {
    f"stages.{stage}.{name}": value for stage in ("short", "ling-moe") for name, value in (("steps", 2), ("batch_size", 2))
}


def call(monkeypatch: pytest.MonkeyPatch, script: object, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/script.py", *map(str, words)])
    script.main()  # type: ignore[attr-defined]


def test_a_teacher_is_trained_and_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "CASES", 1)
    monkeypatch.setattr(migration, "DOMAINS", ("kjv",))
    monkeypatch.setattr(migration, "EVALUATION_TOKENS", 512)
    monkeypatch.setattr(measurer, "sample_completions", lambda *args, **kwargs: [])
    draw = random.Random(0)
    texts = [" ".join(draw.choices(json.__doc__.split(), k=400)) for _ in range(40)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t, "license": "PSF-2.0"}) + "\n" for t in texts))
    settings = {f"model.overrides.{name}": value for name, value in SMALL.items()} | TRAINING
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    results = tmp_path / "results"
    words = [tmp_path / "work", text, "--vocabulary", 400, "--device", "cpu", "--results", results / "teacher.json", "--", *flags]
    call(monkeypatch, moe_teacher, *words)
    rows = {row["name"]: row for row in json.loads((results / "teacher.json").read_text())["rows"]}
    assert rows["short, curve"]["value"] == rows["ling-moe, curve"]["value"] == 2
    assert rows["teacher, recall of 1 of 1"]["goal"] and "teacher, kjv" in rows
    call(monkeypatch, moe_teacher, *words)  # a finished one is measured again

    teacher, corpus = tmp_path / "work/run/models/ling-moe", tmp_path / "work/corpus"
    config = read_hf_config(teacher)
    assert config["architectures"] == ["BailingMoeV2ForCausalLM"]
    assert (config["num_experts"], config["num_experts_per_tok"], config["partial_rotary_factor"]) == (8, 4, 0.5)
    common = ["--text", corpus, "--tokens", 512, "--rows", 2, "--length", 128, "--device", "cpu", "--results", results]
    common += ["--", "--text.calibration_tokens", 512]
    arms = ("best-all-mixers", "continued", "trained-on", "trained-on-kl")
    call(monkeypatch, migration, teacher, tmp_path / "arms", *arms, *common)
    for arm in arms:
        found = {row["name"]: row for row in json.loads((results / f"ling-moe-{arm}-0.json").read_text())["rows"]}
        assert 0 <= found[f"{arm}, recall of 1 of 1"]["peer_value"] <= 1
        assert ("lightning, experts kept" in found) == (arm == "best-all-mixers")
    # What is there is left alone; of what was lost only the rows are made again.
    kept = (results / "ling-moe-continued-0.json").stat().st_mtime_ns
    (results / "ling-moe-best-all-mixers-0.json").unlink()
    call(monkeypatch, migration, teacher, tmp_path / "arms", *arms, *common)
    assert (results / "ling-moe-best-all-mixers-0.json").exists()
    assert (results / "ling-moe-continued-0.json").stat().st_mtime_ns == kept
