"""`openling data` from the command line."""

import json
import sys
from pathlib import Path

import pytest

from openling.cli import main

sys.path.append(str(Path(__file__).parents[1] / "data"))
from byte_corpus import TOKENIZER, jsonl  # noqa: E402


@pytest.fixture
def tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_corpus_is_built_inspected_and_verified(tmp_path, tokenizer, capsys):
    web = jsonl(tmp_path / "web.jsonl", ["one", "two"])
    (tmp_path / "notes.md").write_text("# notes")
    words = ["data", "build", str(web), f"own={tmp_path / 'notes.md'}", str(tmp_path / "out"), "--tokenizer", tokenizer]
    assert main([*words, "--licence", "web=CC0", "--licence", "mine", "--language", "en"]) == 0
    out = capsys.readouterr().out
    assert "16 tokens in 2 shards" in out and "CC0  en" in out and "mine  en" in out
    assert main([*words, "--licence", "web=CC0", "--licence", "mine", "--language", "en"]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][1]["name"] == "own"
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    assert "2 shards, 16 tokens: nothing wrong" in capsys.readouterr().out
    shard = tmp_path / "out" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["data", "verify", str(tmp_path / "out")]) == 1
    assert "wrong  000001.safetensors: the shard is cut short" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "out")]) == 2
    shard.unlink()
    shard.mkdir()
    assert main(["data", "verify", str(tmp_path / "out")]) == 1
    assert "wrong  000001.safetensors: a shard cannot be read (Is a directory)" in capsys.readouterr().out


def test_a_mixture_says_what_it_needs(tmp_path, tokenizer, capsys):
    texts = [str(jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(50)])) for name in ("web", "math")]
    assert main(["data", "build", *texts, str(tmp_path / "out"), "--tokenizer", tokenizer]) == 0
    toml = f'preset = "cpt_figure"\nlength = 16\n[[sources]]\ncorpus = "{tmp_path / "out"}"\nsource = "web"\ngroup = "general"\n'
    toml += f'[[sources]]\ncorpus = "{tmp_path / "out"}"\nsource = "math"\ngroup = "reasoning"\n'
    (tmp_path / "stage.toml").write_text(toml)
    words = ["data", "mix", str(tmp_path / "stage.toml"), "--rows", "1", "--steps"]
    capsys.readouterr()
    assert main([*words, "25"]) == 0
    out = capsys.readouterr().out
    assert "64.000%" in out and "36.000%" in out and "400 tokens" in out
    assert main([*words, "1000"]) == 2
    assert "cannot be met" in capsys.readouterr().err
    (tmp_path / "stage.toml").write_text("preset =")
    assert main([*words, "1"]) == 2


def test_what_is_asked_wrongly_is_refused(tmp_path, tokenizer, capsys):
    web = str(jsonl(tmp_path / "web.jsonl", ["one"]))
    for words, message in (
        ([web, "--tokenizer", str(tmp_path / "nothing")], "nothing"),
        ([web, "--tokenizer", tokenizer, "--licence", "wob=MIT"], "no source of that name"),
        ([web, "--tokenizer", tokenizer, "--filter", "self-repetitoin"], "no such step"),
        ([web, "--tokenizer", tokenizer, "--workers", "0"], "--workers"),
        ([web + "x", "--tokenizer", tokenizer], "no such source"),
    ):
        assert main(["data", "build", words[0], str(tmp_path / "out"), *words[1:]]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_bytes_are_a_tokenizer_and_recipes_no_mixture(tmp_path, capsys):
    web = jsonl(tmp_path / "web.jsonl", ["one", "two"])
    assert main(["data", "build", str(web), str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert "8 tokens in 1 shards" in capsys.readouterr().out  # three bytes and an end each
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "small"\n[[stages]]\nname = "one"\n')
    assert main(["data", "mix", str(recipe), "--rows", "2", "--steps", "2"]) == 2
    told = capsys.readouterr().err
    assert "this is a recipe" in told and "openling train" in told
