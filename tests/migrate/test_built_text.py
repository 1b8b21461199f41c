"""Built corpora as the text of a migration."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import Place, Result, byte_tokenizer, make_llama, openling_command, refused

import openling
from openling.config.migrate import Text
from openling.data.dataset import Dataset, scattered_tokens
from openling.errors import Failure, UserError
from openling.migrate import pipeline
from openling.migrate.texts import evaluation_windows
from openling.weights.folder import load_tokenizer


def corpus(place: Place, folder: Path, **texts: str) -> Path:
    sources = []
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        sources.append(f"{name}={folder / name}.txt")
    built = openling_command("data", "build", *sources, folder / "corpus", "--tokenizer", place.teacher, "--licence", "MIT")
    assert built.code == 0, built.err
    return folder / "corpus"


def test_every_token_once_in_blocks_of_all_sources(place: Place, tmp_path: Path) -> None:
    folder = corpus(place, tmp_path, a="a b c d e " * 40, z="v w x y z " * 40)
    tokenizer = load_tokenizer(place.teacher, openling.load(place.teacher).config)
    streams = [Dataset(folder).stream(name) for name in ("a", "z")]
    everything = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    found = scattered_tokens([folder], tokenizer, vocab_size=260, max_tokens=None, block=16)
    assert found.dtype == np.int32
    assert np.array_equal(np.sort(found), np.sort(everything))
    assert not np.array_equal(found, everything)
    fewer = scattered_tokens([folder], tokenizer, vocab_size=260, max_tokens=100, block=16)
    assert np.array_equal(fewer, found[:100])
    # Half of the first blocks come from either source: of 6 with a fair coin 0 or 6 would be 1 in 32, and the order is fixed.
    first = set(tokenizer.decode(fewer).replace(" ", ""))
    assert first & set("abcde")
    assert first & set("vwxyz")
    with pytest.raises(UserError, match="tokens that the model has not"):
        scattered_tokens([folder], tokenizer, vocab_size=200, max_tokens=None, block=16)


def test_a_migration_reads_a_built_corpus(place: Place, tmp_path: Path, quick: None) -> None:
    folder = corpus(place, tmp_path, text=place.calibration.read_text())
    result = place.migrate(tmp_path / "out", "--stage", "lightning", **{"text.calibration": f'["{folder}"]'})
    assert result.code == 0, result.err
    assert '"licence": "MIT"' in (tmp_path / "out.run" / "report.json").read_text()
    mixed = place.migrate(tmp_path / "mixed", **{"text.calibration": f'["{folder}", "{place.calibration}"]'})
    refused(mixed, "cannot be mixed", "cal.txt")


def test_built_corpora_are_measured_on_beside_other_texts(place: Place, tmp_path: Path) -> None:
    held = corpus(place, tmp_path, prose=place.evaluation.read_text(), code="def f(x): return x\n" * 40)
    texts = json.dumps([str(held), f"mine={held}", str(place.evaluation)])
    out, few = tmp_path / "out", {"gates.stop": "false", "recall.lengths": "[32]"}
    result = place.migrate(out, "--stage", "lightning", **{"text.evaluation": texts}, **few)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out.run" / "report.json").read_text())
    domains = report["stages"][-1]["domains"]
    assert list(domains) == ["corpus", "mine", "eval.txt"]
    assert domains["corpus"] == domains["mine"] != domains["eval.txt"]
    rows = [(row["name"], row["licence"], row["source"]) for row in report["texts"] if row["role"] == "evaluation"]
    built = [(f"{label}: {name}", "MIT", str(held)) for label in ("corpus", "mine") for name in ("prose", "code")]
    assert rows == [*built, ("eval.txt", "the user's own", str(place.evaluation))]


def test_windows_for_evaluation_come_from_all_over_a_corpus(place: Place, tmp_path: Path) -> None:
    folder = corpus(place, tmp_path, a="a b c d e " * 40, z="v w x y z " * 40)
    text = Text(calibration=("python-docs",), evaluation=(str(folder),), sequence_length=16, evaluation_tokens=160)
    tokenizer = load_tokenizer(place.teacher, openling.load(place.teacher).config)
    windows = evaluation_windows(text, tokenizer, vocab_size=260)["corpus"]
    assert windows.shape == (10, 16)
    assert windows.dtype == np.int32
    letters = [set(tokenizer.decode(window).replace(" ", "")) for window in windows]
    assert any(found <= set("abcde") for found in letters)
    assert any(found <= set("vwxyz") for found in letters)


def test_of_a_built_in_text_what_a_corpus_may_hold_is_not_measured_on(place: Place, tmp_path: Path) -> None:
    folder = str(corpus(place, tmp_path, text="a b c d e " * 40))
    tokenizer = load_tokenizer(place.teacher, openling.load(place.teacher).config)

    def windows(*calibration: str) -> np.ndarray:
        text = Text(calibration=calibration, evaluation=("kjv",), sequence_length=16, evaluation_tokens=160)
        return evaluation_windows(text, tokenizer, vocab_size=260)["kjv"]

    assert np.array_equal(windows(folder), windows("kjv"))
    assert not np.array_equal(windows(folder), windows("python-docs"))


def test_resume_refuses_another_corpus(place: Place, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    held = corpus(place, tmp_path, text=place.evaluation.read_text())

    def run(*words: str) -> Result:
        return place.migrate(tmp_path / "out", "--stage", "lightning", *words, **{"eval-text": held})

    def fail(*args: object, **kwargs: object) -> None:
        raise Failure("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "to_lightning", fail)
        assert run().code == 1
    (tmp_path / "other").mkdir()
    other = corpus(place, tmp_path / "other", text=place.evaluation.read_text()[1:])
    held.rename(tmp_path / "first")
    other.rename(held)
    refused(run("--resume"), "this has changed: texts")
    held.rename(other)
    (tmp_path / "first").rename(held)
    assert run("--resume").code == 0


def test_folders_that_are_no_corpus_to_measure_on(place: Place, tmp_path: Path) -> None:
    def refuses(spec: object, *parts: str) -> None:
        refused(place.migrate(tmp_path / "out", **{"eval-text": spec}), *parts)
        assert not (tmp_path / "out.run").exists()

    folder = tmp_path / "shards"
    folder.mkdir()
    refuses(folder, "no corpus", f"where:    {folder}", "value:    empty", "expected:", "index.json", "next:", "data build")
    (folder / "a.safetensors").write_bytes(b"")
    refuses(f"mine={folder}", "no corpus", f"where:    {folder}", "value:    a.safetensors", "data build")
    (folder / "index.json").write_text("{}")
    refuses(folder, "index is damaged", "index.json")
    other = make_llama(tmp_path / "other")
    byte_tokenizer(other, reverse=True)
    built = corpus(replace(place, teacher=other), tmp_path, text=place.evaluation.read_text())
    refuses(built, "another tokenizer", "data build")
    next(built.glob("*.safetensors")).unlink()
    refuses(built, "shard")


def test_a_corpus_is_not_learnt_from_and_held_out(place: Place, tmp_path: Path) -> None:
    folder = corpus(place, tmp_path, text=place.calibration.read_text())
    copy = shutil.copytree(folder, tmp_path / "copy")
    for held in (folder, f"mine={copy}"):
        result = place.migrate(tmp_path / "out", text=folder, **{"eval-text": held})
        refused(result, "cannot be learnt from and held out", "--eval-text", "data build")
    twice = json.dumps([f"a={folder}", f"a={copy}"])
    refused(place.migrate(tmp_path / "out", **{"text.evaluation": twice}), "the same name", "value:    a", "NAME=TEXT")


def test_a_conversion_reads_a_built_corpus(place: Place, tmp_path: Path) -> None:
    folder = corpus(place, tmp_path, text=place.calibration.read_text())
    sizes = ["--text.sequence_length", "64", "--text.calibration_tokens", "512"]
    result = openling_command("convert", place.teacher, tmp_path / "out", "--to", "hybrid", "--text", folder, *sizes)
    assert result.code == 0, result.err
