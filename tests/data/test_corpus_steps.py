"""Copies go and the first stays; defects go and are counted; recipes write what they say, with provenance."""

import random
import re

import numpy as np
import pytest
from byte_corpus import TOKENIZER, built, jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corpus_build import contents, documents

from openling.data.build import BuildConfig, build
from openling.data.dataset import Dataset
from openling.data.dedup import copies, parse_dedup, shingles, signatures
from openling.data.defects import self_repetition, structure
from openling.data.recall import recall
from openling.data.sources import Record, Source
from openling.data.steps import Filter, counted, make_step
from openling.data.synthesis import RECIPES, atomic_facts, definitions, long_documents
from openling.errors import UserError

FACT = re.compile(r"\n\n([^\n]*?(?: is|:)) (\w[\w ]*\.?)\n\n")
WORDS = [f"w{i}" for i in range(3000)]


def prose(seed, length=200):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def records(*texts):
    return [Record(str(i), text, "s", "MIT", "en") for i, text in enumerate(texts)]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_exact_copies_go_wherever_they_stand(texts, cut):
    parts = [signatures(records(*part), "exact") for part in (texts[:cut], texts[cut:])]
    gone, counts = copies(parts, "exact", 1)
    assert [t for t, g in zip(texts, gone, strict=True) if not g] == list(dict.fromkeys(texts))
    assert counts == {"documents in": len(texts), "exact copies": sum(gone), "documents out": len(set(texts))}


def test_near_copies_go_by_their_similarity():
    pytest.importorskip("rensa")
    texts, expected = [], []
    for seed in range(60):
        words = prose(seed).split()
        texts.append(" ".join(words))
        expected.append(False)
        swapped = list(words)
        for place in random.Random(seed).sample(range(200), 3):  # 3 words are in at most 15 of 196 shingles: at least 0.85 alike
            swapped[place] = "new"
        texts.append(" ".join(swapped))
        expected.append(True)
        for place in random.Random(seed + 1).sample(range(200), 60):  # few shingles are left
            swapped[place] = "other"
        texts.append(" ".join(swapped))
        expected.append(False)
    gone, counts = copies([signatures(records(*texts[:50]), "near"), signatures(records(*texts[50:]), "near")], "near", 0.7)
    assert (gone == np.array(expected)).mean() > 0.98 and not gone[::3].any()
    assert counts["near copies"] == gone.sum()


def test_scripts_without_spaces_have_shingles():
    assert len(shingles("天地玄黃宇宙洪荒日月盈昃")) == 8 and shingles("two words") == ["two words"]


def test_a_build_removes_copies_across_sources_and_processes(tmp_path):
    pytest.importorskip("rensa")
    texts = [prose(i) for i in range(30)]
    near = [t + " and more" for t in texts[:5]]
    for name, workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        built(
            tmp_path / name, config_dedup="near", config_unit_bytes=5000, workers=workers, a=texts, b=near + texts[5:9] + ["own"]
        )
    corpus = tmp_path / "one" / "corpus"
    assert contents(corpus) == contents(tmp_path / "two" / "corpus")
    assert sorted(d[1] for d in documents(corpus, "a")) == sorted(texts)
    assert [d[1] for d in documents(corpus, "b")] == ["own"]
    report = Dataset(corpus).index["report"]["steps"]["dedup near"]
    assert report == {"documents in": 40, "exact copies": 4, "near copies": 5, "documents out": 31}
    assert all(".gone." in p.name for p in (tmp_path / "one" / "corpus.run" / "scan").iterdir())


def test_wrong_ways_are_refused():
    for text in ("close", "exact:0.5", "near:x", "near:0.2"):
        with pytest.raises(UserError, match="no way to remove copies"):
            parse_dedup(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose(1, 600), None),
        (prose(1, 60) + " " + prose(1, 60), "repeats itself"),
        (prose(1, 3000) + " the end is near and the end is here again now" * 60, "repeats itself in one stretch"),
        ("天地玄黃宇宙洪荒日月盈昃辰宿列張" * 5, "repeats itself"),
        ("short", None),
        ("", None),
    ],
)
def test_self_repetition(text, reason):
    assert self_repetition().defect(text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose(2), None),
        ("x = 1\n```\ncode\n```\n", None),
        ("# Heading\n" + "-" * 60 + "\n" + prose(3), None),
        ("a" + "!" * 300, "one character without end"),
        ("word " * 11_000, "a line without end"),
        ("text\n```python\ncode", "a code block is left open"),
        ("caf\ufffd and more", "characters are lost"),
        ("|+-/ {}; " * 40, "hardly any words"),
    ],
)
def test_structural_collapse(text, reason):
    assert structure().defect(text) == reason


def test_filters_are_counted_in_the_report(tmp_path):
    loop = "again and again " * 50
    folder = built(tmp_path, config_filters=("self-repetition", "structure:run=5"), a=[prose(1), loop, "hm" + "m" * 9])
    steps = Dataset(folder).index["report"]["steps"]
    assert steps["self-repetition"]["repeats itself"] == 1 and steps["self-repetition"]["documents out"] == 2
    assert steps["structure:run=5"]["one character without end"] == 1 and steps["structure:run=5"]["documents out"] == 1
    assert steps["self-repetition"]["characters in"] - steps["self-repetition"]["characters out"] == len(loop)


FACTS = "Vienna is the capital of Austria. It is a city. The Danube is a river in Europe that flows east. We went there."


def test_atomic_facts_become_questions():
    assert [f.subject for f in definitions(FACTS)] == ["Vienna", "The Danube"]
    old, new = atomic_facts()(iter(records(FACTS)))
    assert old.text == FACTS and new.provenance == "atomic-facts" and new.licence == "MIT" and new.id == "0#facts"
    assert new.text.count("Answer: ") == 2 and "Vienna" in new.text and "Danube" in new.text
    assert [r.provenance for r in atomic_facts(keep=False)(iter(records(FACTS, "nothing here")))] == ["atomic-facts"]


def test_long_documents_ask_about_their_parts():
    group = [FACTS, prose(1), "Oslo is the capital of Norway and its largest city."]
    mixed = [*records(*group[:2]), Record("9", group[2], "s", "CC0", "no")]
    (long,) = long_documents(characters=len("".join(group)), keep=False)(iter(mixed))
    assert all(f"[{i}] {text}" in long.text for i, text in enumerate(group, 1))
    assert "Oslo is the capital of Norway and its largest city. [3]" in long.text
    assert (long.licence, long.language, long.provenance) == ("CC0 AND MIT", "mul", "long-documents")


def test_provenance_is_a_column(tmp_path):
    folder = built(tmp_path, config_synthesis=("atomic-facts",), a=[FACTS, "plain"])
    assert sorted(Dataset(folder).stream("a").shard(0).column("provenance")) == ["", "", "atomic-facts"]
    assert Dataset(folder).index["report"]["steps"]["atomic-facts"]["documents out"] == 3


def shorter_than(length=5):
    return Filter(lambda text: "long" if len(text) >= length else None)


def test_steps_of_ones_own(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["one", "longer"])
    config = BuildConfig((Source("a", str(path)),), filters=(f"{__name__}.shorter_than:length=4",))
    index = build(config, tmp_path / "out", TOKENIZER)
    assert index["sources"][0]["documents"] == 1
    counts = {}
    assert list(counted(shorter_than(), iter(records("a", "bbbbbb")), counts))[0].text == "a" and counts["long"] == 1
    for spec, message in (
        ("nothing.there", "cannot be imported"),
        ("atomic-facts:many=1", "do not fit"),
        ("facts", "no such step"),
    ):
        with pytest.raises(UserError, match=message):
            make_step(spec, RECIPES)


def test_recall_states_facts_again_and_never_against_what_stands():
    texts = [prose(i, 3000) for i in range(20)]
    found = list(recall(share=0.5)(iter(records(*texts))))
    assert found == list(recall(share=0.5)(iter(records(*texts)))) != list(recall(share=0.5, seed=1)(iter(records(*texts))))
    plain = [r for r in found if not r.provenance]
    assert 3 < len(plain) < 17 and all(r.text in texts for r in plain)
    again = asked = 0
    for record in found:
        if not record.provenance:
            continue
        assert record.provenance == "recall" and record.licence == "MIT" and record.id.endswith("#recall")
        said = {}
        for match in FACT.finditer(record.text):
            statement, value = match.groups()
            known = said.get(statement)
            # Within reach, less what a fact and the text before it are long at most.
            if known and match.start() - known[1] < 3000:
                assert known[0] == value
            asked += statement.startswith("The secret number of ")
            again += known is not None
            said[statement] = value, match.start()
        assert FACT.sub("", record.text) == texts[int(record.id.split("#")[0])]
    assert again > 500 and asked > 100


def test_recall_of_texts_without_words():
    (record,) = recall(share=1)(iter(records("天地玄黃 宇宙洪荒 " * 200)))
    assert FACT.sub("", record.text) == "天地玄黃 宇宙洪荒 " * 200 and FACT.search(record.text)
    for share in (0, 1.1):
        with pytest.raises(UserError, match="options do not fit"):
            make_step(f"recall:share={share}", RECIPES)
