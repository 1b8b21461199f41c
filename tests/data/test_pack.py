"""Tokens keep every document; batches keep every window and their place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openling.data.batches import NO_TARGET, check_fingerprint
from openling.data.pack import Batches, cut_windows, tokenise
from openling.errors import UserError


def byte_tokenizer():
    """A token per byte: ids 0-255 in the byte alphabet's order, 256 the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=8)


TOKENIZER = byte_tokenizer()


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=90), limit=st.none() | st.integers(1, 400))
def test_tokens_are_all_documents_each_with_an_end(texts, limit):
    tokens = tokenise(iter(texts), TOKENIZER, vocab_size=257, max_tokens=limit)
    # A token per byte is what makes the expected length independent of the tokenizer.
    lengths = [len(t.encode()) for t in texts]
    total = sum(lengths) + len(texts)
    assert tokens.dtype == np.int32 and len(tokens) == min(total, limit or total)
    ends = [i for i in (np.cumsum(np.asarray(lengths, int) + 1) - 1).tolist() if i < len(tokens)]
    assert np.flatnonzero(tokens == 256).tolist() == ends


def test_a_limit_stops_the_reading():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "abcdefghi"

    assert len(tokenise(endless(), TOKENIZER, vocab_size=300, max_tokens=1000)) == 1000
    assert len(read) <= 100 + 64


def test_a_wrong_tokenizer_is_refused():
    with pytest.raises(UserError, match="257 tokens"):
        tokenise(["a"], TOKENIZER, vocab_size=256)
    with pytest.raises(UserError, match="end-of-text"):
        tokenise(["a"], PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer), vocab_size=300)


@given(tokens=st.integers(0, 100), length=st.integers(1, 20), at_least=st.integers(1, 4))
def test_windows_are_consecutive_or_refused(tokens, length, at_least):
    ids = np.arange(tokens, dtype=np.int32)
    if tokens < at_least * length:
        with pytest.raises(UserError, match=rf"{tokens} tokens[\s\S]*{at_least * length} tokens"):
            cut_windows(ids, length, at_least=at_least)
        return
    windows = cut_windows(ids, length, at_least=at_least)
    assert windows.shape == (tokens // length, length)
    assert np.array_equal(windows.ravel(), ids[: windows.size])


@given(windows=st.integers(1, 12), batch=st.integers(1, 15), seed=st.integers(0, 99), epochs=st.integers(1, 4))
def test_every_window_once_per_epoch(windows, batch, seed, epochs):
    data = np.arange(windows, dtype=np.int32)[:, None]
    batches = Batches(data, batch_size=batch, seed=seed)
    # `batch` epochs end on a batch.
    stream = torch.cat([batches.batch(i).ids for i in range(windows * epochs)]).ravel()
    assert stream.dtype == torch.int64
    for epoch in stream.view(-1, windows):
        assert sorted(epoch.tolist()) == list(range(windows))


@given(windows=st.integers(1, 12), batch=st.integers(1, 15), steps=st.lists(st.integers(0, 40), max_size=9))
def test_a_batch_depends_on_its_number_alone(windows, batch, steps):
    data = np.arange(windows * 3, dtype=np.int32).reshape(windows, 3)
    straight = Batches(data, batch_size=batch, seed=1)
    in_order = [straight.batch(i) for i in range(41)]
    jumping = Batches(data, batch_size=batch, seed=1)
    for i in steps:
        found = jumping.batch(i)
        assert torch.equal(found.ids, in_order[i].ids)
        assert torch.equal(found.targets[:, :-1], found.ids[:, 1:]) and (found.targets[:, -1] == NO_TARGET).all()
        assert found.cu_seqlens.tolist() == list(range(0, batch * 3 + 1, 3))


def test_order_depends_on_seed_and_epoch():
    data = np.arange(64, dtype=np.int32)[:, None]
    orders = {tuple(Batches(data, batch_size=64, seed=s).batch(i).ids.ravel().tolist()) for s in range(3) for i in range(2)}
    assert len(orders) == 6


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"seed": 1}, {"data": 1}])
def test_another_stream_is_known_by_its_fingerprint(other):
    data = np.arange(8, dtype=np.int32)[:, None]
    saved = Batches(data, batch_size=2, seed=0).fingerprint()
    check_fingerprint(Batches(data.copy(), batch_size=2, seed=0), saved)
    with pytest.raises(UserError, match="data differ"):
        check_fingerprint(
            Batches(data + other.get("data", 0), batch_size=other.get("batch_size", 2), seed=other.get("seed", 0)), saved
        )
