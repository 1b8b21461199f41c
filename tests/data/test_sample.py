"""Documents that a model of known letters writes: its distribution, whole parts after any end, the same again."""

import json
import multiprocessing
import os
import re
from collections import Counter

import pytest
import torch

import openling.data.sample as module
from openling.cli import main
from openling.data.byte_tokenizer import byte_tokenizer
from openling.data.sample import Job, SampleConfig, sample
from openling.errors import Failure, UserError
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.weights.export import save
from openling.weights.folder import load

LETTERS = "abcdefghijklmnopqrst "
END = 258  # <|role_end|>, the byte tokenizer's eos


def letters():
    """Ids of the letters, with weights 1 to 5; the end comes once in 50 tokens."""
    tokenizer = byte_tokenizer()
    weights = {tokenizer.convert_tokens_to_ids(tokenizer.tokenize(c)[0]): 1.0 + i % 5 for i, c in enumerate(LETTERS)}
    return weights | {END: sum(weights.values()) / 49}


CONFIG = ModelConfig(
    vocab_size=264,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    layer_kinds=("gqa", "gqa"),
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.3,
    tie_word_embeddings=False,
    eos_token_id=END,
)


def write_model(folder, weights):
    """All tokens have one embedding, so every context gives one hidden state, and the head alone says what comes."""
    torch.manual_seed(0)
    model = Ling(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.model.word_embeddings.weight[:] = model.model.word_embeddings.weight[:1]
        h = model.model(torch.tensor([[5, 9]]))[0, -1]
        logits = torch.full((CONFIG.vocab_size,), -60.0)
        for token, weight in weights.items():
            logits[token] = torch.tensor(weight).log()
        model.lm_head.weight[:] = logits[:, None] * h / h.square().sum()
    save(model, folder, name="letters", provenance={"weights": "made for a test"})
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher") / "letters", letters())


def job(teacher, out, tokens=8000, *, batch=8, **settings):
    loaded = load(teacher)
    config = SampleConfig(tokens, **{"max_new_tokens": 128, **settings})
    return Job(teacher, out, config, loaded.config, loaded.tokenizer, batch)


def draw(teacher, out, tokens=8000, **settings):
    return sample(job(teacher, out, tokens, **settings), lambda: load(teacher).model)


def lines(out):
    return [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, draw(teacher, out)


def test_documents_say_whose_they_are_and_fill_whole_parts(whole):
    out, total = whole
    found = lines(out)
    assert len(content(out)) >= 3 and set(found[0]) == {"id", "text", "source", "license"}
    assert found[0]["source"] == "letters samples" and found[0]["license"] == "as the model"
    assert total["documents"] == len(found) and 8000 <= total["tokens"] < 8000 + 128
    assert total["tokens"] == sum(len(d["text"]) for d in found)
    assert [d["id"] for d in found] == sorted((d["id"] for d in found), key=lambda i: int(i.split("/")[1]))


def test_a_corpus_can_be_built_of_them(whole, teacher, tmp_path):
    out = whole[0]
    assert main(["data", "build", f"own={out}", str(tmp_path / "corpus"), "--tokenizer", str(teacher)]) == 0
    index = json.loads((tmp_path / "corpus" / "index.json").read_text())
    assert index["sources"][0]["documents"] == whole[1]["documents"]
    shard = (tmp_path / "corpus" / index["shards"][0]["file"]).read_bytes()
    assert b"as the model" in shard and b"letters samples" in shard


def test_letters_come_as_often_as_the_model_says(whole):
    """Chi-square over 21 letters: 20 degrees of freedom, beyond 46 once in a thousand. Ends: geometric, cut at 128."""
    found = lines(whole[0])
    seen = Counter("".join(d["text"] for d in found))
    weights = dict(zip(LETTERS, (w for t, w in letters().items() if t != END), strict=True))
    count, whole_weight = sum(seen.values()), sum(weights.values())
    assert set(seen) == set(weights)
    expected = {c: count * w / whole_weight for c, w in weights.items()}
    assert sum((seen[c] - e) ** 2 / e for c, e in expected.items()) < 46
    cut = sum(len(d["text"]) == 128 for d in found)
    share, expect = cut / len(found), (49 / 50) ** 128
    assert abs(share - expect) < 3.5 * (expect * (1 - expect) / len(found)) ** 0.5


def test_a_temperature_sharpens(teacher, tmp_path):
    draw(teacher, tmp_path / "out", temperature=0.5, tokens=4000)
    seen = Counter("".join(d["text"] for d in lines(tmp_path / "out")))
    # weights 5 and 1 become 25 and 1
    assert 18 < (seen["e"] + seen["j"] + seen["o"] + seen["t"]) / (seen["a"] + seen["f"] + seen["k"] + seen["p"]) < 35


def test_the_same_again_whatever_the_batch_and_another_with_another_seed(teacher, whole, tmp_path):
    draw(teacher, tmp_path / "again", batch=5)
    assert content(tmp_path / "again") == content(whole[0])
    draw(teacher, tmp_path / "other", seed=1)
    assert not {d["text"] for d in lines(tmp_path / "other") if len(d["text"]) > 20} & {d["text"] for d in lines(whole[0])}


def _die_at(teacher, out, number, where):
    """A process that ends without a word while it writes a part, or before it records one."""
    written = module.new_file

    def half(path):
        if path.name == module.part_name(number):
            path.with_name(f".{path.name}.tmp").write_bytes(b'{"id": "half')
            os._exit(9)
        return written(path)

    def record(self, unit, result, old=module.Units.record):
        if where == "recording" and unit.endswith(f"{number:05d}"):
            os._exit(9)
        old(self, unit, result)

    if where == "writing":
        module.new_file = half
    module.Units.record = record
    draw(teacher, out)


@pytest.mark.parametrize("where", ["writing", "recording"])
def test_killed_at_a_part_the_same_command_goes_on_to_the_same_bytes(teacher, whole, tmp_path, where):
    out = tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(target=_die_at, args=(teacher, out, 1, where))
    child.start()
    child.join()
    assert child.exitcode == 9 and not out.exists()
    first = tmp_path / "out.run" / "out" / module.part_name(0)
    assert first.read_bytes() == content(whole[0])[first.name]
    before = first.stat().st_mtime_ns
    assert draw(teacher, out) == whole[1]
    assert content(out) == content(whole[0]) and (out / first.name).stat().st_mtime_ns == before
    assert draw(teacher, out) == whole[1]  # finished: nothing to do


def test_a_chat_is_the_template_with_question_and_answer_of_the_model(teacher, tmp_path):
    total = draw(teacher, tmp_path / "out", prompt="both", tokens=6000)
    found = lines(tmp_path / "out")
    chats = [d["text"] for d in found if d["id"].startswith("chat/")]
    assert len(chats) > 20 and len(found) - len(chats) > 20 and total["dropped"]["no question, or one without end"]
    shape = r"<role>USER</role>([a-t ]{1,63})<\|role_end\|><role>ASSISTANT</role>([a-t ]*)"
    parts = [re.fullmatch(shape, text) for text in chats]
    assert all(parts) and 64 < max(len(m[1]) + len(m[2]) for m in parts) <= 128
    tokenizer = byte_tokenizer()
    assert END in tokenizer(chats[0], add_special_tokens=False)["input_ids"]


def test_a_model_of_which_nothing_is_worth_keeping_fails(tmp_path):
    dot = byte_tokenizer().convert_tokens_to_ids(".")
    looping = write_model(tmp_path / "looping", {dot: 1.0, END: 1e-9})
    with pytest.raises(Failure, match="64 x one character without end"):
        draw(looping, tmp_path / "out", tokens=64 * 256, max_new_tokens=256, batch=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 0}, "--tokens"),
        ({"temperature": 0.0}, "--temperature"),
        ({"max_new_tokens": 1}, "--max-new-tokens"),
        ({"max_new_tokens": 512}, "513 tokens with the prompt"),
        ({"seed": -1}, "--seed"),
        ({"prompt": "poem"}, "bos, chat or both"),
        ({"batch": 0}, "--batch"),
    ],
)
def test_settings_without_meaning_are_refused(teacher, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        draw(teacher, tmp_path / "out", **settings)
    assert not (tmp_path / "out.run").exists()


def test_another_job_in_the_same_place_is_refused(teacher, whole, tmp_path):
    with pytest.raises(UserError, match="config.seed"):
        draw(teacher, whole[0], seed=1)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="something else"):
        draw(teacher, tmp_path / "taken")


def test_a_folder_that_lacks_what_is_needed_is_refused(teacher, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in teacher.iterdir():
        if "token" not in path.name and "template" not in path.name:
            (bare / path.name).write_bytes(path.read_bytes())
    words = ["data", "sample", str(bare), str(tmp_path / "out"), "--tokens", "100", "--max-new-tokens", "32", "--device", "cpu"]
    assert main(words) == 2
    assert "no tokenizer" in capsys.readouterr().err
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    assert main([*words, "--prompt", "chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert main(words) == 0
    assert "tokens in" in capsys.readouterr().out
    assert sum(len(d["text"]) for d in lines(tmp_path / "out")) >= 100
