"""Overrides of a configuration: every field can be set, no mistake passes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openling.config.load import field_names, override
from openling.config.migrate import MigrateConfig, preset
from openling.errors import UserError

CONFIG = preset("best")
NAMES = field_names(CONFIG)


def value_at(config: MigrateConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_leaf_has_a_name() -> None:
    assert {"preset", "seed", "text.calibration", "layout.kv_lora_rank", "linear_warmup.train.lr", "mla_warmup.trainable"} <= set(
        NAMES
    )
    assert not any(name in ("text", "linear_warmup", "linear_warmup.train") for name in NAMES)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--seed", "7"], "seed", 7),
        (["--seed=7"], "seed", 7),
        (["--linear-warmup.train.lr", "1e-4"], "linear_warmup.train.lr", 1e-4),
        (["--text.calibration", "a.txt, b.txt"], "text.calibration", ("a.txt", "b.txt")),
        (["--text.calibration", '["a,b.txt"]'], "text.calibration", ("a,b.txt",)),
        (["--text.calibration", "123"], "text.calibration", ("123",)),
        (["--stages", "mla"], "stages", ("mla",)),
        (["--conversion.match_heads", "false"], "conversion.match_heads", False),
        (["--layout.kv_lora_rank", "null"], "layout.kv_lora_rank", None),
        (["--text.calibration_tokens", "1e3"], "text.calibration_tokens", 1000),
        (["--linear_warmup.train.betas", "0.8,0.9"], "linear_warmup.train.betas", (0.8, 0.9)),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--compare_start=true"], "compare_start", True),
    ],
)
def test_values(words: list[str], name: str, value: Any) -> None:
    changed = override(CONFIG, words)
    assert value_at(changed, name) == value
    assert type(value_at(changed, name)) is type(value)
    others = [n for n in NAMES if n != name]
    assert [value_at(changed, n) for n in others] == [value_at(CONFIG, n) for n in others]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--linear_warmup.train.lrr", "1"], ["unknown argument", "nearest:  --linear_warmup.train.lr"]),
        (["--text", "a"], ["unknown argument"]),
        (["seed", "1"], ["unknown argument"]),
        (["--seed"], ["needs a value"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", "1.5"], ["--seed"]),
        (["--seed", "true!"], ["--seed", "true!"]),
        (["--dtype", "bfloat"], ["--dtype", "value:    bfloat", "nearest:  bfloat16"]),
        (["--conversion.mla_damping", "true"], ["--conversion.mla_damping", "no switch"]),
        (["--gates.final_gap", "false"], ["--gates.final_gap", "or null"]),
        (["--gates.recall_drop", "-0.1"], ["--gates.recall_drop", "greater than or equal to 0"]),
        (["--recall.lengths", "[true]"], ["--recall.lengths", "no switch"]),
        (["--layout.mla_layers", "lingg"], ["where:    --layout.mla_layers\n", "nearest:  ling"]),
        (["--layout.mla_layers", "1.5"], ["where:    --layout.mla_layers\n", "a list"]),
        (["--conversion.rope_fold", "x"], ["where:    --conversion.rope_fold\n", "'auto', or a valid integer"]),
        (["--stages", "[]"], ["--stages", "1 or more"]),
        (["--seed", str(2**63)], ["less than", f"nearest:  {2**63 - 1}"]),
        (["--seed", "9" * 5000], ["--seed"]),
        (["--layout.group_size=true"], ["--layout.group_size", "no switch"]),
        (["--linear_warmup.train.accumulation", "0"], ["greater than 0", "nearest:  1"]),
        (["--linear_warmup.train.min_lr_ratio", "2"], ["less than or equal to 1", "nearest:  1"]),
        (["--conversion.damping", "NaN"], ["--conversion.damping", "finite"]),
        (["--conversion.damping", "0"], ["--conversion.damping", "expected: greater than 0"]),
        (["--text.sequence_length", "1"], ["--text.sequence_length"]),
        (["--stages", "lightning,ml"], ["--stages.1", "ml"]),
        (
            ["--linear_warmup.train.batch_size", "9", "--linear_warmup.train.accumulation", "4"],
            ["accumulation = 4 does not divide", "nearest:  accumulation = 3"],
        ),
        (["--linear_warmup.train.kl", "0"], ["there is no loss"]),
    ],
)
def test_mistakes(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        override(CONFIG, words)
    for part in said:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_typo_of_a_flag_names_the_flag() -> None:
    with pytest.raises(UserError, match="nearest: +--stage$"):
        override(CONFIG, ["--stge", "mla"], flags=["--stage", "--teacher"])


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words_give_a_configuration_or_a_user_error(words: list[str]) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(override(CONFIG, words), MigrateConfig)


@given(st.sampled_from(NAMES), st.text(max_size=12))
def test_any_value_gives_a_configuration_or_a_user_error(name: str, text: str) -> None:
    try:
        assert isinstance(override(CONFIG, [f"--{name}", text]), MigrateConfig)
    except UserError as error:
        # Settings that do not fit each other are named by their section and what is wrong.
        together = ("exactly one of", "divide", "no loss", "go together")
        assert name in str(error) or any(words in str(error) for words in together)
