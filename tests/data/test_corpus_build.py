"""A corpus holds every document of its sources once, whoever builds it and however often he is killed."""

import contextlib
import errno
import gzip
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from byte_corpus import END, TOKENIZER, built, byte_tokenizer, decode, jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openling.commands.data import describe
from openling.data import build as build_module
from openling.data.build import BuildConfig, build
from openling.data.dataset import Dataset
from openling.data.shards import read_index
from openling.data.sources import BadInput, Fields, Seen, Source, parse_source, plan_units, read_unit
from openling.data.tokens import pieces
from openling.errors import Failure, UserError

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


def documents(folder, source):
    """(id, text, licence, language, source column) of a source, from its shards."""
    dataset, found = Dataset(folder), []
    stream = dataset.stream(source)
    for number in range(len(stream._places)):
        shard = stream.shard(number)
        bounds = [0, *shard.ends.tolist()]
        columns = zip(*(shard.column(c) for c in ("licence", "language", "source")), strict=True)
        for (a, b), id, labels in zip(zip(bounds, bounds[1:], strict=False), shard.ids(), columns, strict=True):
            assert shard.tokens[b - 1] == END
            found.append((id, decode(shard.tokens[a : b - 1]), *labels))
    return found


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_documents_keep_text_and_labels(tmp_path):
    rows = [{"text": "plain"}, {"text": "own ü", "license": "CC0", "language": "de", "source": "wiki"}, {"text": " \n"}]
    folder = built(tmp_path, web=rows, code=["int main() {}"])
    web = {text: rest for _, text, *rest in documents(folder, "web")}
    assert web == {"plain": ["MIT", "en", "web"], "own ü": ["CC0", "de", "wiki"]}
    assert [d[1] for d in documents(folder, "code")] == ["int main() {}"]
    source = Dataset(folder).sources["web"]
    assert (source["documents"], source["licence"], source["language"]) == (2, "CC0, MIT", "de, en")


def test_control_tokens_are_text_unless_they_are_meant(tmp_path):
    spelled = TOKENIZER.eos_token
    for name, meant in (("text", False), ("meant", True)):
        folder = built(tmp_path, name, web=[{"text": f"a{spelled}b"}], config_control_tokens=meant)
        shard = Dataset(folder).stream("web").shard(0)
        inner = shard.tokens[: shard.ends[0] - 1].tolist()
        assert (END in inner) is meant
        assert decode([i for i in inner if i != END]) == ("ab" if meant else f"a{spelled}b")


def test_linked_files_are_read_once(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.txt"
    inside.mkdir()
    outside.write_text("from elsewhere")
    (inside / "own.txt").write_text("own")
    for name, target in (("far.txt", outside), ("again.txt", inside / "own.txt"), ("broken.txt", tmp_path / "nowhere.txt")):
        (inside / name).symlink_to(target)
    build(BuildConfig((Source("web", str(inside)),)), tmp_path / "corpus", TOKENIZER)
    assert sorted(text for _, text, *_ in documents(tmp_path / "corpus", "web")) == ["from elsewhere", "own"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=20), size=st.integers(1, 200), ends=st.booleans())
def test_every_line_is_in_one_unit(tmp_path, texts, size, ends):
    path = jsonl(tmp_path / "a.jsonl", texts)
    if not ends:
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    source = Source("a", str(path))
    units = plan_units([source], unit_bytes=size)
    read = [r.text for unit in units for r in read_unit(unit, source, Fields(), pytest.fail, Seen())]
    assert read == [t for t in texts if t and not t.isspace()]


def test_folders_and_packed_files_are_read(tmp_path):
    root = tmp_path / "code"
    (root / ".git").mkdir(parents=True)
    (root / ".git" / "x.py").write_text("hidden")
    (root / "node_modules").mkdir()
    (root / "node_modules" / "y.js").write_text("vendored")
    (root / "picture.png").write_bytes(b"\xff\xfe")
    (root / "a.py").write_text("print()")
    (root / "empty.py").touch()
    with gzip.open(root / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n')
    build(BuildConfig((Source("code", str(root)),)), tmp_path / "out", TOKENIZER)
    assert sorted(d[:2] for d in documents(tmp_path / "out", "code")) == [("a.py", "print()"), ("b.jsonl.gz@0", "packed")]


def test_parquet_is_read_by_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pa.table({"content": ["one", None, "two", "three"], "license": ["CC0", None, "", "MIT"]})
    parquet.write_table(table, path, row_group_size=2)
    source = Source("a", str(path), "unknown")
    units = plan_units([source], unit_bytes=1)
    assert [(u.start, u.stop) for u in units] == [(0, 1), (1, 2)]
    seen = Seen()
    records = [r for u in units for r in read_unit(u, source, Fields(text="content"), pytest.fail, seen)]
    assert [(r.text, r.licence) for r in records] == [("one", "CC0"), ("two", "unknown"), ("three", "MIT")]
    assert seen == Seen(1, {"license"})
    with pytest.raises(UserError, match="no such column"):
        list(read_unit(units[0], source, Fields(), pytest.fail, Seen()))
    with pytest.raises(UserError, match="expected: content, license; fields of the top level alone"):
        list(read_unit(units[0], source, Fields(text="meta.text"), pytest.fail, Seen()))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cut short or damaged"):
        plan_units([source])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"body": "x"}', 'no string under "text"'),
        (b"[1]", 'no string under "text"'),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also"}\n')
    config = BuildConfig((Source("a", str(path)),))
    with pytest.raises(BadInput, match=message) as caught:
        build(config, tmp_path / "out", TOKENIZER)
    assert caught.value.parts["where"] == f"{path}, line 3" and not (tmp_path / "out").exists()
    index = build(BuildConfig(config.sources, skip_bad=True), tmp_path / "skipped", TOKENIZER)
    assert index["sources"][0]["documents"] == 2 and index["report"]["bad"] == 1
    assert f"{path}, line 3" in index["report"]["named"][0]


def test_documents_without_text_and_columns_without_words_are_told(tmp_path):
    rows = [{"text": "one", "language_code": 7}, {"text": None}, {"text": ""}, {"text": " \n"}, {"text": "two", "from": "web"}]
    index = read_index(built(tmp_path, web=rows, config_fields=Fields(source="from", language="language_code")))
    report = index["report"]
    assert (index["sources"][0]["documents"], report["empty"], report["absent"]) == (2, 3, ["language_code"])
    told = describe(tmp_path / "corpus")
    assert "left out: 3 documents without text" in told and 'no row has a word under "language_code"' in told
    whole = describe(built(tmp_path, "whole", code=["plain"]))
    assert "left out" not in whole and "no row" not in whole
    nested = jsonl(tmp_path / "nested.jsonl", [{"meta": {"text": "deep"}}])
    with pytest.raises(BadInput, match="meta.text[\\s\\S]*fields of the top level alone are read"):
        build(BuildConfig((Source("a", str(nested)),), Fields(text="meta.text")), tmp_path / "out", TOKENIZER)


def test_bad_sources_are_refused(tmp_path):
    def fail(error):
        raise error

    def read(path):
        source = Source("a", str(path))
        return [r for u in plan_units([source]) for r in read_unit(u, source, Fields(), fail, Seen())]

    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"not UTF-8\n.*latin.txt, byte 3"):
        read(tmp_path / "latin.txt")
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cut short or damaged"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "empty.jsonl").touch()
    for empty in ("empty.jsonl", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="the source is empty"):
            read(tmp_path / empty)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="not read"):
        read(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"no such source[\s\S]*python-docs"):
        parse_source("python-doc", licences={}, languages={})
    with pytest.raises(UserError, match="nothing is left of a source"):
        built(tmp_path, a=["x"], b=["  "])
    with pytest.raises(UserError, match="same name"):
        build(BuildConfig((Source("a", str(tmp_path)), Source("a", str(tmp_path)))), tmp_path / "o", TOKENIZER)


def test_control_tokens_in_a_text_are_text(tmp_path):
    folder = built(tmp_path, a=["one<end>two"])
    assert Dataset(folder).stream("a").read(0, 12).tolist().count(END) == 1
    assert documents(folder, "a")[0][1] == "one<end>two"


@given(text=st.text(st.sampled_from("ab \n"), max_size=200), longest=st.integers(2, 50))
def test_long_texts_are_cut_at_lines(text, longest):
    parts = list(pieces(text, longest))
    assert "".join(parts) == text and all(len(p) <= longest for p in parts)


MANY = {"a": [f"document {i} " * (i % 7 + 1) for i in range(300)], "b": [f"other {i}" for i in range(50)]}


def test_processes_and_repeats_make_the_same_bytes(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = built(tmp_path / "one", config_unit_bytes=4000, **MANY)
    second = built(tmp_path / "two", config_unit_bytes=4000, workers=2, **MANY)
    assert contents(first) == contents(second) and len(contents(first)) > 4
    index = read_index(first)
    config = BuildConfig(tuple(Source(n, str(tmp_path / "one" / f"{n}.jsonl"), "MIT", "en") for n in MANY), unit_bytes=4000)
    assert build(config, first, TOKENIZER) == index  # nothing to do
    for other in (BuildConfig(config.sources, unit_bytes=4000, seed=1), BuildConfig(config.sources[:1], unit_bytes=4000)):
        with pytest.raises(UserError, match="another corpus already"):
            build(other, first, TOKENIZER)


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = built(tmp_path / "whole", config_unit_bytes=2000, **MANY)
    (tmp_path / "killed").mkdir()
    kills = 0
    for attempt in range(200):
        again = _again if attempt else _first
        place = {"target": _dying, "args": (again, tmp_path / "killed", 1 + attempt // 4, attempt % 2 == 0)}
        child = multiprocessing.get_context("fork").Process(**place)
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        assert not list(tmp_path.glob("killed/*/index.json"))
    assert kills >= 4 and child.exitcode == 0
    out = tmp_path / "killed" / "corpus"
    assert contents(out) == contents(whole)
    _again(tmp_path / "killed")  # killed after the rename: the same command says it is done


def _dying(build_again, folder, count, before):
    """Kill this process before or after its `count`-th file or folder gets its name."""
    rename = Path.rename
    done = []

    def counted(self, target):
        if str(self).startswith(str(folder)):
            done.append(target)
        if len(done) == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = rename(self, target)
        if len(done) == count and target != folder / "corpus":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Path.rename = counted
    build_again(folder)


def _first(folder):
    built(folder, config_unit_bytes=2000, **MANY)


def _again(folder):
    config = BuildConfig(tuple(Source(n, str(folder / f"{n}.jsonl"), "MIT", "en") for n in MANY), unit_bytes=2000)
    build(config, folder / "corpus", TOKENIZER)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    count = 0

    def full(out, view):
        nonlocal count
        count += 1
        os.write(out, view[: len(view) // 2])
        if count % 3 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.write(out, view[len(view) // 2 :])

    monkeypatch.setattr("openling.data.shards.write_all", full)
    with pytest.raises(UserError, match=r"no space left[\s\S]*value: +No space left on device, [\d,]+ bytes free") as error:
        built(tmp_path, config_unit_bytes=2000, **MANY)
    assert error.value.parts["where"] == tmp_path / "corpus.run" / "out" / "000002.safetensors"
    assert "the same command goes on" in error.value.parts["next"]
    assert not (tmp_path / "corpus").exists()
    assert len(list((tmp_path / "corpus.run" / "out").iterdir())) == 2  # whole ones; the draft is gone
    monkeypatch.undo()
    _again(tmp_path)
    assert not any(problems for _, problems in Dataset(tmp_path / "corpus").verify())


def test_a_lost_shard_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_finish", lambda *a: {})
    built(tmp_path, config_unit_bytes=2000, **MANY)
    monkeypatch.undo()
    shards = sorted((tmp_path / "corpus.run" / "out").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    _again(tmp_path)
    assert not any(problems for _, problems in Dataset(tmp_path / "corpus").verify())


def test_the_same_command_mends_damaged_shards(tmp_path):
    how = {"config_unit_bytes": 2000, "config_dedup": "exact"} | MANY
    folder = built(tmp_path, **how)
    before = contents(folder)
    names = sorted(before)[:3]
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(before[names[1]][:-9])
    (folder / names[2]).write_bytes(before[names[2]][:-1] + b"!")
    config = BuildConfig(
        tuple(Source(n, str(tmp_path / f"{n}.jsonl"), "MIT", "en") for n in MANY), dedup="exact", unit_bytes=2000
    )
    said = []
    build(config, folder, TOKENIZER, say=said.append)
    assert contents(folder) == before and len(said) == 4
    assert sorted(p.name for p in (tmp_path / "corpus.run").iterdir()) == ["done", "plan.json", "scan"]


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_finished_corpus_that_was_removed_is_built_again(tmp_path, dedup):
    folder = built(tmp_path, config_unit_bytes=2000, config_dedup=dedup, **MANY)
    before = contents(folder)
    shutil.rmtree(folder)
    sources = tuple(Source(n, str(tmp_path / f"{n}.jsonl"), "MIT", "en") for n in MANY)
    build(BuildConfig(sources, dedup=dedup, unit_bytes=2000), folder, TOKENIZER)
    assert contents(folder) == before


def test_what_is_no_corpus_is_left_alone(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "folder").mkdir()
    for out in (source, tmp_path / "folder"):
        with pytest.raises(UserError, match="no corpus[\\s\\S]*behind the sources"):
            build(BuildConfig((Source("a", str(source), "MIT", "en"),)), out, TOKENIZER)


def test_a_worker_that_dies_is_said(tmp_path):
    with pytest.raises(Failure, match="worker process died"):
        built(tmp_path, workers=2, config_filters=("dying_step.dies",), a=["one"], b=["two"])
    assert not (tmp_path / "corpus").exists()


def test_sources_that_change_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_finish", lambda *a: {})
    built(tmp_path, a=["one"])
    time.sleep(0.01)
    jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=r"not finished[\s\S]*a.jsonl"):
        built(tmp_path, a=["one", "two"])
    build_module._job.cache_clear()
    (tmp_path / "corpus.run" / "done" / "tokenise-000000.json").unlink()
    with pytest.raises(Failure, match="changed since"):
        build_module.work(tmp_path / "corpus.run", "tokenise", "000000")


def test_another_corpus_may_be_built_in_the_same_place(tmp_path):
    for texts in (["one"], ["two", "three"]):
        folder = built(tmp_path, a=texts)
        assert sorted(d[1] for d in documents(folder, "a")) == sorted(texts)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "corpus.run")


def test_another_tokenizer_is_refused(tmp_path):
    dataset = Dataset(built(tmp_path, a=["one"]))
    dataset.check_tokenizer(byte_tokenizer())
    with pytest.raises(UserError, match="another tokenizer"):
        dataset.check_tokenizer(byte_tokenizer(end="<stop>"))
    with pytest.raises(UserError, match="tokens that the model has not"):
        dataset.check_model(256)
    with pytest.raises(UserError, match=r"no such source[\s\S]*nearest:  a"):
        dataset.stream("aa")


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def regions(path):
    """Every byte region of a shard: the header's length, the header, each array."""
    import json

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found = {"length": (0, 8), "header": (8, 8 + size)}
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] < entry["data_offsets"][1]:
            found[name] = tuple(8 + size + x for x in entry["data_offsets"])
    return found


def test_damage_in_every_region_is_found(tmp_path):
    folder = built(tmp_path, a=[f"text {i}" for i in range(40)])
    shard = folder / "000000.safetensors"
    whole = shard.read_bytes()
    assert set(regions(shard)) == {
        *("length", "header", "tokens", "ends", "hash", "ids", "id_ends", "source", "licence", "language", "provenance")
    }
    random = np.random.default_rng(0)
    for start, stop in regions(shard).values():
        for place in {start, stop - 1, *random.integers(start, stop, 3).tolist()}:
            data = bytearray(whole)
            data[place] ^= 1 << int(random.integers(8))
            shard.write_bytes(data)
            assert [bool(p) for _, p in Dataset(folder).verify()] == [True]
            with pytest.raises(UserError):
                Dataset(folder).stream("a").read(0, 5)
    for size in (0, 7, 100, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short"):
            Dataset(folder)
    shard.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="longer"):
        Dataset(folder)
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        Dataset(folder)
    assert [bool(p) for _, p in Dataset(folder, check=False).verify()] == [True]


def test_what_sampling_cannot_see_verify_and_reading_do(tmp_path):
    folder = built(tmp_path, a=["word " * 60_000])
    shard = folder / "000000.safetensors"
    start, stop = regions(shard)["tokens"]
    data = bytearray(shard.read_bytes())
    data[start + 60_001] = 0xFF  # the upper byte of token 30,000, outside every sampled block
    shard.write_bytes(data)
    stream = Dataset(folder).stream("a")
    stream.read(0, 1000)
    with pytest.raises(UserError, match="beyond the vocabulary"):
        stream.read(29_990, 30_010)
    assert "SHA-256" in next(Dataset(folder).verify())[1][0]


def test_a_damaged_index_is_refused(tmp_path):
    folder = built(tmp_path, a=["one", "two"])
    path = folder / "index.json"
    whole, index = path.read_bytes(), read_index(folder)
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 200).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            assert read_index(folder) == index  # white space only
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match="index is damaged"):
        read_index(folder)
    path.unlink()
    with pytest.raises(UserError, match="no corpus"):
        read_index(folder)
