"""Streamed text against decoding everything at once; stop strings against character by character; bytes and offsets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openling.serve.detokenize import Detokenizer, TokenBytes, stream_text

REPLACEMENT = "\ufffd"


def byte_tokenizer():
    """One token per byte, so that characters beyond ASCII come in parts; one special token, and a mark that is special too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", additional_special_tokens=["<tool_call>"])


def piece_tokenizer():
    """Llama-like: pieces with a visible space, single bytes as a fallback."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "\u2581the", "n", "a", "\u2581cat", "\u4f60"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(["\u2581\u2581"])  # a run of spaces, as Gemma has them
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer():
    """No bytes and no decoder: words that decoding joins with spaces."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "sat": 2, "[UNK]": 3}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES, PIECES, WORDS = byte_tokenizer(), piece_tokenizer(), word_tokenizer()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_streamed_text_is_whole_and_never_broken(text):
    pieces = list(stream_text(BYTES, [*BYTES(text)["input_ids"], BYTES.eos_token_id]))
    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces) or REPLACEMENT in text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_any_bytes_stream_as_they_decode(ids):
    assert "".join(stream_text(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 262), max_size=20))
def test_pieces_and_byte_fallback_stream_as_they_decode(ids):
    expected = b"".join(TokenBytes(PIECES).of(id) for id in ids).decode(errors="replace")
    assert "".join(stream_text(PIECES, ids)) == expected
    if all(id > 255 for id in ids):
        assert expected == PIECES.decode(ids)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=12))
def test_words_stream_as_they_decode(ids):
    assert "".join(stream_text(WORDS, ids)) == WORDS.decode(ids)


def test_ascii_shows_at_once_and_an_unfinished_character_at_the_end():
    ids = BYTES("ab\u20ac")["input_ids"]  # the euro sign has three bytes
    assert list(stream_text(BYTES, ids)) == ["a", "b", "\u20ac"]
    assert list(stream_text(BYTES, ids[:-1])) == ["a", "b", REPLACEMENT]


def test_special_tokens_are_hidden_and_marks_are_not():
    tokens = TokenBytes(BYTES)
    mark = BYTES.convert_tokens_to_ids("<tool_call>")
    assert tokens.of(BYTES.eos_token_id) == b"" and tokens.full(BYTES.eos_token_id) == b"<end>"
    assert tokens.of(mark) == b"<tool_call>"
    assert TokenBytes(BYTES, shown=()).of(mark) == b""
    assert tokens.full(99999) == b""


def test_offsets_are_where_the_text_of_each_token_begins():
    tokens, text = TokenBytes(BYTES), "a\u20acb"
    ids = [*BYTES(text)["input_ids"], BYTES.eos_token_id]
    assert tokens.offsets(ids, start=10) == [10, 11, 11, 11, 12, 13]
    assert TokenBytes(WORDS).offsets([0, 1, 2]) == [0, 1, 5]  # "a cat sat": a space belongs to the word after it
    assert [tokens.text(id) for id in ids[:3]] == ["a", REPLACEMENT, REPLACEMENT]


def by_character(text, stops, include):
    """The rule itself: after each character, does a stop string end here?"""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\u20acc", max_size=16),
    stops=st.lists(st.text("ab\u20acc", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_equal_character_by_character(text, stops, include):
    reader = Detokenizer(TokenBytes(BYTES), stop=stops, include_stop=include)
    pieces = []
    for id in BYTES(text)["input_ids"]:
        pieces.append(reader.push(id))
        if reader.stopped is not None:
            break
        assert by_character(text, stops, include)[0].startswith("".join(pieces))  # nothing that was shown is taken back
    pieces.append(reader.finish())
    expected, stop = by_character(text, stops, include)
    assert ("".join(pieces), reader.stopped) == (expected, stop)


def test_held_text_is_only_what_may_become_a_stop_string():
    reader = Detokenizer(TokenBytes(BYTES), stop=["abc", "bd"])
    shown = [reader.push(id) for id in BYTES("xabxabd")["input_ids"]]
    assert shown == ["x", "", "", "abx", "", "", "a"]
    assert reader.stopped == "bd" and reader.finish() == ""


@pytest.mark.parametrize(("text", "shown"), [("ababc", "ababc"), ("ab", "ab")])
def test_stop_strings_wait_for_min_tokens(text, shown):
    reader = Detokenizer(TokenBytes(BYTES), stop=["ab"])
    ids = BYTES(text)["input_ids"]
    assert "".join([reader.push(id, may_stop=False) for id in ids] + [reader.finish()]) == shown
    assert reader.stopped is None


def test_the_stop_string_that_is_complete_first_counts_wherever_tokens_end():
    reader = Detokenizer(TokenBytes(WORDS), stop=["t s", "at sat"])
    assert [reader.push(id) for id in (0, 1, 2)] == ["", "a c", "a"]
    assert reader.stopped == "t s"
