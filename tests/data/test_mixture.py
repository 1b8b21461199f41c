"""Mixtures keep their proportions at every step, on any number of ranks, killed and resumed wherever."""

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from byte_corpus import TOKENIZER, built, byte_tokenizer, decode
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.config.data import MIXTURES, MixtureConfig, mixture_preset, read_mixture
from openling.data.batches import BatchSource, check_fingerprint
from openling.data.dataset import Dataset
from openling.data.mixture import MixtureBatches, by_length
from openling.data.shards import BLOCK, SAMPLES
from openling.errors import UserError

LONG = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four sources of different sizes, whose texts name them; `web` and `code` have long documents too."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = {
        "web": [f"web{i:03} " * (1 + i % 4) for i in range(300)] + [f"WEB{i:02} " * 40 for i in range(20)],
        "code": [f"code{i:03}" * (1 + i % 3) for i in range(100)] + [f"CODE{i:02}" * 30 for i in range(15)],
        "math": [f"math{i:03}" for i in range(200)],
        "small": [f"small{i}" for i in range(30)],
    }
    return built(folder, config_unit_bytes=1500, **texts)


def choice(corpus, source, group="all", **fields):
    return {"corpus": str(corpus), "source": source, "group": group} | fields


def mixture(corpus, weights, *, length=16, **fields):
    sources = [choice(corpus, name, weight=w, repeat=1000) for name, w in weights.items()]
    return MixtureConfig(sources=sources, length=length, **fields)


NAMES = ("web", "code", "math", "small")


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.integers(1, 99), min_size=4, max_size=4), rows=st.integers(1, 9), seed=st.integers(0, 3))
def test_proportions_are_exact_at_every_step(corpus, weights, rows, seed):
    batches = MixtureBatches(mixture(corpus, dict(zip(NAMES, weights, strict=True))), rows=rows, seed=seed)
    total = dict.fromkeys(NAMES, 0)
    for step in range(12):
        batch = batches.batch(step)
        for name, tokens in batch.tokens_by_source.items():
            total[name] += tokens
        assert sum(total.values()) == (step + 1) * batches.tokens_per_step
        for name, weight in zip(NAMES, weights, strict=True):
            exact = Fraction(weight, sum(weights)) * (step + 1) * rows
            assert abs(total[name] // 16 - exact) < 4
    assert {n.source: n.tokens for n in batches.needs(12)} == total


@settings(max_examples=20, deadline=None)
@given(world=st.sampled_from([2, 3, 4, 6, 12]), step=st.integers(0, 40), seed=st.integers(0, 3), long=st.booleans())
def test_ranks_and_resuming_change_nothing(corpus, world, step, seed, long):
    config = mixture(corpus, {"web": 3, "code": 1}, long={"length": LONG, "share": 0.25} if long else None)

    def read(**how):
        return MixtureBatches(config, rows=12, seed=seed, **how)

    whole = read()
    for earlier in range(step % 3):  # what was read before does not matter
        whole.batch(earlier)
    parts = [read(rank=r, world=world).batch(step) for r in range(world)]
    assert torch.equal(torch.cat([p.ids for p in parts]), whole.batch(step).ids)
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.batch(step).targets)
    starts = [p.cu_seqlens[:-1] + i * 12 // world * config.row_length for i, p in enumerate(parts)]
    assert torch.cat(starts).tolist() == whole.batch(step).cu_seqlens[:-1].tolist()
    assert sum(sum(p.tokens_by_source.values()) for p in parts) == whole.tokens_per_step
    assert read(rank=1, world=world).fingerprint() == whole.fingerprint() and isinstance(whole, BatchSource)


def test_rows_hold_one_source_and_its_documents_apart(corpus):
    batch = MixtureBatches(mixture(corpus, {"web": 1, "math": 1}), rows=8).batch(0)
    ids, bounds = batch.flat_ids[0], batch.cu_seqlens.tolist()
    for row in batch.ids:
        text = decode(row).lower()
        assert ("web" in text or "eb" in text) != ("math" in text or "ath" in text or "mat" in text)
    for a, b in zip(bounds, bounds[1:], strict=False):
        assert (ids[a : b - 1] != 256).all()
    assert (batch.targets.flatten()[batch.flat_ids[0] == 256] == -100).all()


@settings(max_examples=6, deadline=None)
@given(epoch=st.integers(0, 4), seed=st.integers(0, 3))
def test_an_epoch_of_a_source_reads_every_token_once(corpus, epoch, seed):
    batches = MixtureBatches(mixture(corpus, {"math": 1}), rows=1, seed=seed)
    (need,) = batches.needs(1)
    count = need.available // 16
    windows = np.concatenate([batches.batch(epoch * count + i).ids.numpy() for i in range(count)])
    everything = Dataset(corpus).stream("math").read(0, need.available)
    left = np.bincount(everything, minlength=257) - np.bincount(windows.ravel(), minlength=257)
    assert (left >= 0).all() and left.sum() == need.available % 16
    other = np.concatenate([batches.batch((epoch + 1) * count + i).ids.numpy() for i in range(count)])
    assert not np.array_equal(windows, other)


@pytest.mark.parametrize("of", ["sequences", "tokens"])
def test_long_windows_have_their_share_and_their_documents(corpus, of):
    config = mixture(corpus, {"web": 3, "code": 1}, long={"length": LONG, "share": 0.2, "of": of, "min_document": 100})
    batches = MixtureBatches(config, rows=6)
    long = windows = 0
    for step in range(40):
        batch = batches.batch(step)
        for row in batch.ids:
            text = decode(row)
            is_long = text.upper() == text
            assert is_long or text.lower() == text  # never both kinds of documents in one row
            long += is_long
            windows += 1 if is_long or of == "tokens" else LONG // 16
    assert abs(long - 0.2 * windows) < 4
    lower = batches.batch(0)
    assert lower.ids.shape == (6, LONG) and lower.tokens_by_source.keys() == {"web", "code"}


def test_documents_are_split_by_length_without_loss(corpus):
    stream = Dataset(corpus).stream("web")
    short, long = by_length(stream, 100)
    assert len(short) + len(long) == len(stream)
    texts = [decode(s.read(0, len(s))) for s in (short, long)]
    assert texts[0].islower() and texts[1].isupper()
    whole = stream.read(0, len(stream))
    for part, least, most in ((short, 0, 99), (long, 100, 10**9)):
        starts = part.starts(0, len(part))
        lengths = np.diff([*starts, len(part)])
        assert starts[0] == 0 and ((lengths >= least) & (lengths <= most)).all()
        ends = np.flatnonzero(part.read(0, len(part)) == 256) + 1
        assert ends.tolist() == [*starts[1:], len(part)]
    assert np.bincount(whole).tolist() == np.bincount(np.concatenate([s.read(0, len(s)) for s in (short, long)])).tolist()


def test_a_mixture_that_cannot_be_met_is_refused_before_it_starts(corpus):
    config = MixtureConfig(sources=[choice(corpus, "web", weight=9), choice(corpus, "small", weight=1, repeat=2)], length=16)
    batches = MixtureBatches(config, rows=4, steps=10)
    assert [n.source for n in batches.needs(100) if n.epochs > n.repeat] == ["small"]
    with pytest.raises(UserError, match=r"cannot be met[\s\S]*small: 640 asked, 230 there, repeat 2[\s\S]*repeat = 3 for small"):
        MixtureBatches(config, rows=4, steps=100)
    both = MixtureConfig(sources=[choice(corpus, "web", weight=9), choice(corpus, "small", weight=1)], length=16)
    with pytest.raises(UserError, match=r"repeat = \d{3,} for web, \d{4,} for small"):  # as TOML has numbers
        MixtureBatches(both, rows=4, steps=10**5)
    last = next(step for step in range(1000) if any(n.epochs > n.repeat for n in batches.needs(step + 1)))
    batches.batch(last - 1)
    with pytest.raises(UserError, match="cannot be met"):
        batches.batch(last)


def test_languages_are_balanced_by_temperature(corpus):
    sources = [choice(corpus, name, repeat=1000) for name in NAMES]
    sizes = {name: Dataset(corpus).sources[name]["tokens"] for name in NAMES}
    for temperature in (1, 2, 5):
        config = MixtureConfig(sources=sources, length=16, temperature={"all": temperature})
        needs = {n.source: n.tokens for n in MixtureBatches(config, rows=1000).needs(10)}
        total = sum(size ** (1 / temperature) for size in sizes.values())
        for name, size in sizes.items():
            assert abs(needs[name] / 160_000 - size ** (1 / temperature) / total) < 4 / 10_000


def test_smaller_batches_before_come_in_the_same_order(corpus):
    config = mixture(corpus, {"web": 1, "code": 1})
    plain = MixtureBatches(config, rows=2)
    ramp = MixtureBatches(config, rows=8, ramp=((2, 2), (5, 4)))
    assert [ramp.rows_at(s) for s in range(7)] == [2, 2, 4, 4, 4, 8, 8]
    assert [ramp.first_row(s) for s in range(7)] == [0, 2, 4, 8, 12, 16, 24]
    rows = torch.cat([ramp.batch(s).ids for s in range(7)])
    assert torch.equal(rows, torch.cat([plain.batch(s).ids for s in range(16)]))


def test_the_fingerprint_follows_what_decides_the_order(corpus, tmp_path):
    def fingerprint(weights=(1, 1), *, folder=corpus, rows=4, seed=0, repeat=5, length=16, source="code"):
        sources = [choice(folder, n, weight=w, repeat=repeat) for n, w in zip(("web", source), weights, strict=True)]
        return MixtureBatches(MixtureConfig(sources=sources, length=length), rows=rows, seed=seed).fingerprint()

    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    same = {fingerprint(), fingerprint(folder=moved), fingerprint(repeat=9), fingerprint((2, 2))}
    other = {fingerprint((1, 2)), fingerprint(rows=2), fingerprint(seed=1), fingerprint(length=8), fingerprint(source="math")}
    assert len(same) == 1 and len(other | same) == 6
    with pytest.raises(UserError, match="differ from those of the checkpoint"):
        check_fingerprint(MixtureBatches(mixture(corpus, {"web": 1}), rows=1), fingerprint())


def test_wrong_corpora_are_refused(corpus, tmp_path):
    def read(*sources, **how):
        return MixtureBatches(MixtureConfig(sources=sources, length=16), rows=1, **how)

    with pytest.raises(UserError, match="several sources"):
        read(choice(corpus, None))
    with pytest.raises(UserError, match="in the mixture twice"):
        read(choice(corpus, "web"), choice(corpus, "web"))
    with pytest.raises(UserError, match="tokens that the model has not"):
        read(choice(corpus, "web"), vocab_size=256)
    with pytest.raises(UserError, match="another tokenizer"):
        read(choice(corpus, "web"), tokenizer=byte_tokenizer(end="<stop>"))
    read(choice(corpus, "web"), tokenizer=TOKENIZER, vocab_size=257)
    with pytest.raises(UserError, match=r"no text for these windows[\s\S]*documents of 4000 and more"):
        long = {"length": 32, "share": 0.5, "min_document": 4000}
        MixtureBatches(MixtureConfig(sources=[choice(corpus, "web")], length=16, long=long), rows=1)
    with pytest.raises(UserError, match="multiple of 3 ranks"):
        read(choice(corpus, "web"), world=3)


def test_shards_are_checked_ahead_once_and_only_those_that_are_read(tmp_path):
    texts = {name: [f"{name}{i:03} " * 9 for i in range(300)] for name in ("web", "code")}
    folder = built(tmp_path, config_unit_bytes=8000, **texts)
    lines = Dataset(folder).index["shards"]
    web, code = ([folder / line["file"] for line in lines if line["source"] == name] for name in texts)
    assert len(web) > 1
    data = bytearray(code[-1].read_bytes())
    data[(len(data) - BLOCK) * 3 // (SAMPLES - 1)] ^= 1  # in a sampled block that is neither the first nor the last
    code[-1].write_bytes(data)
    checked = set()
    MixtureBatches(mixture(folder, {"web": 1}), rows=1).check_shards(checked)
    assert checked == set(web)
    both = MixtureBatches(mixture(folder, {"web": 1, "code": 1}), rows=1)
    both.batch(0)
    with pytest.raises(UserError, match="damaged") as error:
        both.check_shards(checked)
    assert error.value.parts["where"] == code[-1] and checked == {*web, *code[:-1]}
    both.check_shards({*web, *code})  # each is taken to be sound


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures_come_to_one(name):
    shares = MIXTURES[name]["shares"]
    sources = tuple({"corpus": "c", "source": g, "group": g} for g in shares)
    config = mixture_preset(name, sources)
    assert sum(Fraction(str(s)) for s in config.shares.values()) == 1
    published = {"mid1_figure": (4096, 32768), "mid1_text": (4096, 32768), "mid2": (32768,) * 2, "mid3": (262144,) * 2}
    assert (config.length, config.row_length) == published.get(name, (4096, 4096))


def test_the_published_figures():
    assert MIXTURES["cpt_figure"]["shares"] == {"general": 0.64, "reasoning": 0.36}
    text = MIXTURES["cpt_text"]["shares"]
    assert (text["general"], text["reasoning"]) == (0.5, 0.46)
    assert round(text["multilingual_web"] + text["multilingual_capability"], 12) == 0.04
    assert MIXTURES["mid3"]["shares"] == {"general": 0.43, "reasoning": 0.42, "agentic": 0.15}
    assert MIXTURES["mid1_figure"]["long"]["share"] == 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "cpt"}, r"no such mixture[\s\S]*cpt_text"),
        ({"shares": {"all": 0.9}}, "come to 0.9"),
        ({"shares": {"al": 0.5, "all": 0.5}}, r"groups that have a source: 'al' is none of all[\s\S]*nearest:  all"),
        ({"sources": [{"corpus": "a"}, {"corpus": "b", "group": "al"}]}, r"'al' is none of all[\s\S]*nearest:  all"),
        ({"shares": {"all": 1.2, "b": -0.2}}, r"m.toml, shares.b\s+value:    -0.2\s+expected: greater than 0"),
        ({"shares": {"all": 1, "b": 0}}, r"m.toml, shares.b\s+value:    0\s+expected: greater than 0"),
        ({"lenght": 5}, r"unknown setting[\s\S]*nearest:  length"),
        ({"length": 100, "long": {"length": 150, "share": 0.2}}, "multiple of length"),
        ({"temperature": {"al": 2}}, r"'al' is none of all[\s\S]*nearest:  all"),
        ({"sources": []}, "1 or more"),
        ({"sources": [{"corpus": "a", "weight": 1}, {"corpus": "b"}]}, "to all sources"),
        ({"sources": [{"corpus": "a", "wieght": 1}]}, "wieght"),
    ],
)
def test_mistakes_in_a_mixture_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        read_mixture({"sources": [{"corpus": "a"}]} | fields, where="m.toml")
