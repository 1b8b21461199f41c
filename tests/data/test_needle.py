"""Needle cases: exact lengths, exact depth, the fact in place, the answer what the tokenizer itself makes of it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from openling.data.needle import CITIES, make_needle
from openling.errors import UserError

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 40


def trained(*, split_digits, bos):
    """A byte-level BPE; with `bos`, a beginning-of-text token opens every text, as Llama's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "The secret number of Oslo is 12345. 123 234 345 456 567 678 789"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = [trained(split_digits=split, bos=bos) for split in (True, False) for bos in (True, False)]


@settings(max_examples=60, deadline=None)
@given(which=st.integers(0, 3), length=st.integers(150, 600), depth=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_a_case_is_exact(which, length, depth, seed):
    tokenizer = TOKENIZERS[which]
    filler = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    case = make_needle(tokenizer, filler, length=length, depth=depth, seed=seed)
    assert len(case.prompt) + len(case.answer) == length
    fact, question = f"\n\nThe secret number of {case.city} is {case.digits}.\n\n", f"\n\nThe secret number of {case.city} is"
    assert tokenizer.decode(case.prompt[case.fact_start : case.fact_end]) == fact
    assert tokenizer.decode(case.prompt + case.answer).endswith(f"{question} {case.digits}")
    assert tokenizer.decode(case.answer) == f" {case.digits}"
    assert case.city in CITIES
    assert len(case.digits) == 5
    head = len(tokenizer("")["input_ids"])
    assert case.prompt[:head] == ([tokenizer.bos_token_id] if head else [])
    behind = len(case.prompt) - case.fact_end - len(tokenizer(question, add_special_tokens=False)["input_ids"])
    before = case.fact_start - head
    # Depth is exact to half a token of the filler.
    assert abs(before - depth * (before + behind)) <= 0.5
    # What is not fact or question is one unbroken piece of the given text.
    rest = case.prompt[head : case.fact_start] + case.prompt[case.fact_end :][:behind]
    assert any(filler[i : i + len(rest)] == rest for i in range(len(filler) - len(rest) + 1))


def test_seed_decides_and_cases_differ():
    tokenizer = TOKENIZERS[0]
    filler = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    cases = [make_needle(tokenizer, filler, length=200, depth=0.5, seed=seed) for seed in range(20)]
    assert cases[7] == make_needle(tokenizer, filler, length=200, depth=0.5, seed=7)
    assert len({case.digits for case in cases}) == 20
    assert len({tuple(case.prompt) for case in cases}) == 20


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_other_facts_stand_anywhere_and_are_not_asked_for(depth):
    tokenizer = TOKENIZERS[0]
    filler = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    alone = make_needle(tokenizer, filler, length=600, depth=depth, seed=3)
    case = make_needle(tokenizer, filler, length=600, depth=depth, seed=3, keys=8)
    assert (case.city, case.digits, case.answer) == (alone.city, alone.digits, alone.answer)
    assert len(case.prompt) + len(case.answer) == 600
    said = re.findall(r"\n\nThe secret number of (\w+) is (\d{5})\.\n\n", tokenizer.decode(case.prompt))
    assert len(said) == len({city for city, _ in said}) == 8
    assert (case.city, case.digits) in said
    fact = f"\n\nThe secret number of {case.city} is {case.digits}.\n\n"
    assert tokenizer.decode(case.prompt[case.fact_start : case.fact_end]) == fact
    others = [make_needle(tokenizer, filler, length=600, depth=depth, seed=seed, keys=8).prompt for seed in range(9)]
    assert len(set(map(tuple, others))) == 9


def test_impossible_lengths_are_refused_with_the_least_possible():
    tokenizer = TOKENIZERS[1]
    filler = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="too short") as error:
        make_needle(tokenizer, filler, length=20, depth=0.5, seed=0)
    least = int(str(error.value.parts["expected"]).split()[2])
    assert len(make_needle(tokenizer, filler, length=least, depth=0.5, seed=0).prompt) < least
    with pytest.raises(UserError, match="too short"):
        make_needle(tokenizer, filler, length=least - 1, depth=0.5, seed=0)
    with pytest.raises(UserError, match="filler"):
        make_needle(tokenizer, filler[:100], length=200, depth=0.5, seed=0)
