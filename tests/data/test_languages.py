"""A source divided by its documents' languages: exact shares of each, on any number of ranks, resumed wherever."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from byte_corpus import TOKENIZER, built, decode

from openling.config.data import MixtureConfig, read_mixture
from openling.config.recipe import resolve
from openling.data import dataset as dataset_module
from openling.data.build import BuildConfig, build
from openling.data.dataset import Dataset
from openling.data.mixture import MixtureBatches
from openling.data.shards import INDEX, _index_hash, read_index
from openling.data.sources import Source
from openling.errors import UserError

LENGTH = 16
# Documents of each; texts name their language, and `und` is what rows without one get. `xx` is shorter than a window.
DOCUMENTS = {"de": 400, "fr": 120, "sw": 12, "und": 30, "xx": 1}


def document(language, i):
    return f"{language}{i:03} " * (20 if i % 10 == 9 else 1 + i % 4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One source whose documents mix languages in every shard, and one without any."""
    rows = [
        {"text": document(language, i)} | ({} if language == "und" else {"language": language})
        for language, count in DOCUMENTS.items()
        for i in range(count)
    ]
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    folder = tmp_path_factory.mktemp("languages")
    sources = []
    for name, lines in (("web", mixed), ("plain", ["no language"] * 40)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in lines))
        sources.append(Source(name, str(path)))
    build(BuildConfig(tuple(sources), unit_bytes=4000), folder / "corpus", TOKENIZER, workers=1)
    assert len(read_index(folder / "corpus")["shards"]) > 6
    return folder / "corpus"


def source(corpus, **fields):
    return {"corpus": str(corpus), "source": "web", "by": "language", "repeat": 10**6} | fields


def mixture(*sources, temperature=1, **fields):
    return MixtureConfig(sources=sources, length=LENGTH, temperature={"all": temperature}, **fields)


def asked(batches, steps):
    return {need.source.removeprefix("web/"): need.tokens for need in batches.needs(steps)}


def test_each_language_is_a_stream_of_whole_documents(corpus):
    streams = Dataset(corpus).languages("web")
    assert list(streams) == sorted(DOCUMENTS)
    for name, stream in streams.items():
        text = decode(stream.read(0, len(stream)))
        assert set(text) <= set(name + "0123456789 ")
        lengths = stream.document_lengths()
        starts = stream.starts(0, len(stream))
        assert len(lengths) == len(starts) == DOCUMENTS[name]
        assert np.array_equal(np.diff([*starts, len(stream)]), lengths)
        # Documents end where the next begins, also where a range ends inside a shard.
        ends = np.flatnonzero(stream.read(0, len(stream)) == 256) + 1
        assert ends.tolist() == [*starts[1:], len(stream)]
        for a, b in ((1, len(stream) - 1), (len(stream) // 3, len(stream) // 2)):
            assert stream.starts(a, b).tolist() == [s for s in starts if a <= s < b]
            assert np.array_equal(stream.read(a, b), stream.read(0, len(stream))[a:b])
    whole = Dataset(corpus).stream("web")
    assert sum(map(len, streams.values())) == len(whole)
    together = np.concatenate([s.read(0, len(s)) for s in streams.values()])
    assert np.array_equal(np.bincount(together), np.bincount(whole.read(0, len(whole))))


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_languages_have_exact_shares_at_every_step(corpus, temperature):
    batches = MixtureBatches(mixture(source(corpus), temperature=temperature), rows=8)
    sizes = {name: len(s) for name, s in Dataset(corpus).languages("web").items() if len(s) >= LENGTH}
    assert set(sizes) == {"de", "fr", "sw", "und"}
    total = sum(size ** (1 / temperature) for size in sizes.values())
    dealt = dict.fromkeys(sizes, 0)
    for step in range(60):
        batch = batches.batch(step)
        for name, tokens in batch.tokens_by_source.items():
            dealt[name.removeprefix("web/")] += tokens
        for name, size in sizes.items():
            exact = size ** (1 / temperature) / total * (step + 1) * 8
            assert abs(dealt[name] // LENGTH - exact) < 4
    assert asked(batches, 60) == dealt
    # The texts are of the languages that are counted.
    for row in batches.batch(3).ids:
        letters = {c for c in decode(row) if c.isalpha()}
        assert any(letters <= set(name) for name in sizes)


@pytest.mark.parametrize("long", [None, {"length": 64, "share": 0.25}])
def test_ranks_and_resuming_change_nothing(corpus, long):
    config = mixture(source(corpus), temperature=3, long=long)
    whole = MixtureBatches(config, rows=8)
    straight = [whole.batch(step) for step in range(12)]
    for world in (2, 4):
        ranks = [MixtureBatches(config, rows=8, rank=r, world=world) for r in range(world)]
        for step in (0, 5, 11):
            parts = [rank.batch(step) for rank in ranks]
            assert torch.equal(torch.cat([p.ids for p in parts]), straight[step].ids)
            assert torch.equal(torch.cat([p.targets for p in parts]), straight[step].targets)
        assert {r.fingerprint() for r in ranks} == {whole.fingerprint()}
    resumed = MixtureBatches(config, rows=8)
    for step in range(7, 12):
        assert torch.equal(resumed.batch(step).ids, straight[step].ids)
        assert torch.equal(resumed.batch(step).cu_seqlens, straight[step].cu_seqlens)


def test_languages_can_be_chosen_and_weighed(corpus):
    only = MixtureBatches(mixture(source(corpus, languages=["fr", "sw"])), rows=4)
    assert set(asked(only, 50)) == {"fr", "sw"}
    # A source's weight is shared by its languages; another source of the same text may have others.
    by_hand = mixture(source(corpus, languages=["fr", "sw"], weight=3), source(corpus, languages=["de"], weight=1), temperature=2)
    found = asked(MixtureBatches(by_hand, rows=4), 1000)
    assert abs(found["de"] / LENGTH - Fraction(1, 4) * 4000) < 4
    sizes = {name: len(s) ** 0.5 for name, s in Dataset(corpus).languages("web").items()}
    assert abs(found["sw"] / LENGTH - 3000 * sizes["sw"] / (sizes["sw"] + sizes["fr"])) < 4
    fingerprints = [
        MixtureBatches(mixture(source(corpus, **fields)), rows=4).fingerprint()
        for fields in ({}, {"by": None}, {"languages": ["fr"]}, {"languages": ["sw"]}, {"repeat": 5})
    ]
    assert fingerprints[0] == fingerprints[-1] and len(set(fingerprints)) == 4


def test_a_tiny_language_is_repeated_only_as_often_as_allowed(corpus):
    with pytest.raises(UserError, match=r"cannot be met[\s\S]*web/sw: [\d,]+ asked, \d+ there, repeat 2"):
        MixtureBatches(mixture(source(corpus, repeat=2), temperature=5), rows=8, steps=200)


def test_few_shards_stay_open(corpus, monkeypatch):
    config = mixture(source(corpus), temperature=2)
    wanted = MixtureBatches(config, rows=32).batch(0)
    monkeypatch.setattr(dataset_module, "OPEN_SHARDS", 2)
    batches = MixtureBatches(config, rows=32)
    assert torch.equal(batches.batch(0).ids, wanted.ids)
    (stream,) = {w.stream.dataset for lane in batches._lanes for w in lane.windows}
    assert len(stream._open) == 2


def test_what_cannot_be_divided_is_refused(corpus, tmp_path):
    def read(*sources):
        MixtureBatches(mixture(*sources), rows=1)

    with pytest.raises(UserError, match=r"no documents of this language[\s\S]*value: +dee[\s\S]*nearest: +de"):
        read(source(corpus, languages=["fr", "dee"]))
    with pytest.raises(UserError, match=r"names its language[\s\S]*--language-field"):
        read(source(corpus, source="plain"))
    for twice in (source(corpus, by=None), source(corpus, languages=["fr"])):
        with pytest.raises(UserError, match="in the mixture twice"):
            read(source(corpus), twice)
    with pytest.raises(UserError, match=r"valid[\s\S]*languages are chosen of a source with by"):
        read_mixture({"sources": [source(corpus, by=None, languages=["de"])]})
    with pytest.raises(UserError, match=r"valid[\s\S]*named twice"):
        read_mixture({"sources": [source(corpus, languages=["de", "de"])]})


def test_corpora_from_before_languages_were_kept_apart(tmp_path):
    """Read as ever; divided where each shard has one language, else refused."""

    def aged(folder):
        index = read_index(folder)
        for line in index["shards"]:
            del line["languages"]
        (folder / INDEX).write_text(json.dumps(index | {"sha256": _index_hash(index)}))
        return folder

    plain = aged(built(tmp_path, "single", web=["abc " * 20] * 5))
    assert list(Dataset(plain).languages("web")) == ["en"]
    MixtureBatches(mixture(source(plain)), rows=1).batch(0)
    mixed = aged(built(tmp_path, "mixed", web=["abc " * 20, {"text": "ab " * 20, "language": "de"}]))
    MixtureBatches(mixture(source(mixed, by=None)), rows=1).batch(0)
    with pytest.raises(UserError, match=r"before languages were kept apart[\s\S]*de, en[\s\S]*data build"):
        MixtureBatches(mixture(source(mixed)), rows=1)


def test_a_recipe_can_say_it():
    stage = {"name": "one", "steps": 1, "mixture": {"preset": "cpt_text", "temperature": {"multilingual_web": 3.0}}}
    groups = ("general", "reasoning", "multilingual_capability")
    sources = [{"corpus": "all", "group": group, "source": group} for group in groups]
    sources.append({"corpus": "all", "group": "multilingual_web", "by": "language", "languages": ["de", "fr"]})
    data = {
        "name": "r",
        "model": {"preset": "tiny", "tokenizer": "bytes"},
        "corpora": {"all": {"path": "somewhere"}},
        "sources": sources,
        "stages": [stage],
    }
    found = resolve(data).stages[0].mixture
    assert found.sources[-1].by == "language" and found.sources[-1].languages == ("de", "fr")
    assert found.temperature == {"multilingual_web": 3.0}
    with pytest.raises(UserError, match="language"):
        resolve(data | {"sources": [*sources[:-1], sources[-1] | {"by": "licence"}]})
