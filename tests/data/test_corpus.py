"""Built-in text is whole and split without overlap; the user's files are read or refused clearly."""

import json
import os
import re

import pytest

from openling.data.corpus import BUILT_IN, CALIBRATION, EVALUATION, find_corpus, load_text, mixture
from openling.errors import UserError


def test_king_james_bible_is_whole(monkeypatch):
    # The published counts: 66 books, 1,189 chapters, 31,102 verses.
    documents, numbers = list(BUILT_IN["kjv"].select()), []
    with monkeypatch.context() as patch:
        patch.setattr("openling.data.corpus.re.sub", lambda pattern, new, text: numbers.extend(re.findall(pattern, text)) or text)
        list(BUILT_IN["kjv"].select())
    assert len(numbers) == 31102
    assert len(documents) == 1189
    assert len({d.id.rsplit("/", 1)[0] for d in documents}) == 66
    texts = {d.id: d.text for d in documents}
    assert texts["kjv/1/1/1"].startswith(
        "The First Book of Moses, called Genesis, chapter 1\n\nIn the beginning God created the heavens and the earth. And the "
    )
    assert texts["kjv/2/27/22"].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert "lights in the firmament of the heaven to give light upon the earth: and it was so." in texts["kjv/1/1/1"]
    assert not any(re.search(r"\d+:\d+", text) for text in texts.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_parts_are_stable_disjoint_and_complete(name):
    corpus = BUILT_IN[name]
    train, heldout = ([d.id for d in corpus.select(part)] for part in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(d.id for d in corpus.select())
    # One in eight, binomial: 4 standard deviations of the share.
    n = len(train) + len(heldout)
    assert abs(len(heldout) / n - 1 / 8) < 4 * (1 / 8 * 7 / 8 / n) ** 0.5
    assert train == [d.id for d in corpus.select("train")]


def test_a_part_is_a_property_of_the_name_alone():
    parts = {d.id: d.part for d in BUILT_IN["python-code"].select()}
    # sha256 of the name, first 8 bytes, modulo 8: written down so that it cannot drift.
    assert (parts["json/decoder.py"], parts["copy.py"]) == ("train", "heldout")


def test_heldout_documentation_is_nowhere_in_the_training_text():
    def paragraphs(documents):
        found = (" ".join(p.split()) for d in documents for p in re.split(r"\n\s*\n", d.text))
        return {p for p in found if len(p) >= 60}

    docs = BUILT_IN["python-docs"]
    assert not paragraphs(docs.select("heldout")) & paragraphs(docs.select("train"))
    parts = {d.id: d.part for d in docs.select()}
    assert all(parts.get(d.id, d.part) == d.part for d in BUILT_IN["python-code"].select())


def test_documentation_has_topics_and_docstrings():
    texts = {d.id: d.text for d in BUILT_IN["python-docs"].select()}
    assert 'The "try" statement' in texts["topic/compound"]
    assert "textwrap.dedent(text)\n\nRemove any common leading whitespace" in texts["textwrap.py"]
    assert sum(map(len, texts.values())) > 2_000_000


def test_missing_package_names_the_next_command(monkeypatch):
    monkeypatch.setattr("openling.data.corpus.find_spec", lambda name: None)
    with pytest.raises(UserError, match="make setup"):
        list(load_text("kjv"))


def test_mixture_is_balanced_and_repeatable():
    texts, owner = list(mixture(CALIBRATION, "train")), {}
    for name in CALIBRATION:
        owner |= dict.fromkeys(BUILT_IN[name].documents("train"), name)
    first = texts[:200]
    share = sum(len(t) for t in first if owner[t] == "python-docs") / sum(map(len, first))
    # Sources alternate by characters taken, so the imbalance is at most one document.
    assert abs(share - 0.5) < max(map(len, first)) / sum(map(len, first))
    assert texts == list(mixture(CALIBRATION, "train"))
    assert sorted(texts) == sorted(owner)
    assert set(EVALUATION) - set(CALIBRATION) == {"kjv"}


def test_user_files(tmp_path):
    (tmp_path / "b.txt").write_text("Beta\n")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfAlpha")
    (tmp_path / "skip.png").write_bytes(b"\xff")
    (tmp_path / "sub").mkdir()
    rows = [{"text": "one\u2028line"}, {"text": ""}, {"text": "two", "id": 3}]
    (tmp_path / "sub" / "c.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    assert list(load_text(tmp_path)) == ["Alpha", "Beta\n", "one\u2028line", "two"]
    assert list(load_text(str(tmp_path / "b.txt"))) == ["Beta\n"]
    train, heldout = list(load_text(tmp_path, "train")), list(load_text(tmp_path, "heldout"))
    assert sorted(train + heldout) == sorted(load_text(tmp_path))
    assert find_corpus(tmp_path).source == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"abc\xffdef", "byte 3"),
        ("x.txt", b" \n ", "empty"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2"),
        ("x.jsonl", b'{"text": 3}\n', 'no string under "text"'),
        ("x.jsonl", b"[1]\n", "list"),
        ("x.jsonl", b"{\n", "not JSON"),
        ("x.pdf", b"%PDF", "not read"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(load_text(path))
    assert str(path) in str(caught.value) and caught.value.exit_code == 2


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="nearest: +python-docs"):
        load_text("python-doc")
    with pytest.raises(UserError, match="no such text") as caught:
        load_text(tmp_path / "nofile.txt")
    assert caught.value.parts["next"]
    with pytest.raises(UserError, match="holds no text"):
        list(load_text(tmp_path))


def test_what_is_no_text_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")  # to read it would wait for a writer
    with pytest.raises(UserError, match="neither a file nor a folder"):
        load_text(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="without a name"):
        load_text("")
