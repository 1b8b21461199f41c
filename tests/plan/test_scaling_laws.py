"""The Ling scaling laws against the published numbers, and the shapes that are drawn from them."""

import pytest

from openling.config.presets import PRESETS
from openling.errors import UserError
from openling.model import count
from openling.model.families import read_config
from openling.plan import scaling

# Values of the laws at C = 6 N D for published N and D, to the digits printed in our specification.
LAWS = [  # (active parameters, tokens, learning rate, sequences of 4096)
    (51e9, 20e12, "1.878e-04", 18251),
    (6.1e9, 20e12, "2.598e-04", 8418),
    (1.4e9, 20e12, "3.254e-04", 4924),
    (63e9, 9.6e12, "2.03e-04", 15086),
    (7.4e9, 9.6e12, "2.82e-04", 6913),
]


@pytest.mark.parametrize(("active", "tokens", "rate", "sequences"), LAWS)
def test_the_laws_give_the_specified_digits(active, tokens, rate, sequences):
    flops = 6 * active * tokens
    digits = len(rate.split("e")[0]) - 2
    assert f"{scaling.learning_rate(flops):.{digits}e}" == rate
    assert round(scaling.batch_tokens(flops) / 4096) == sequences


# What Ling-2.0 was trained with.
PUBLISHED = [("ling-1t", 1.86e-4, 18144), ("ling-flash-2.0", 2.61e-4, 8352), ("ling-mini-2.0", 3.36e-4, 4400)]


@pytest.mark.parametrize(("name", "rate", "sequences"), PUBLISHED)
def test_published_rates_and_batches_lie_where_the_ways_of_counting_flops_put_them(name, rate, sequences):
    """The paper leaves open what C counts and prints rounded coefficients; both together bound the prediction.

    C per token: at least 3 x forward without head at the mean context, or 6 N; at most with head and 4096 visible keys. The
    published rate has 3 digits, coefficients 3 to 5, exponents 4 decimals. A batch is a multiple of the data-parallel ranks: 96
    for Ling-1T (2016 GPUs in 21 stages), rounded either way.
    """
    c = read_config(PRESETS[name]())
    ways = [scaling.training_flops(c), 6.0 * count.active_parameters(c), 3.0 * count.forward_flops(c, 4096).total]
    low, high = 20e12 * min(ways), 20e12 * max(ways)
    exponent = high**0.00005
    slack = exponent * (1 + 0.00005 / 1.1576) * (1 + 0.005e-4 / rate)
    assert scaling.learning_rate(high) / slack < rate < scaling.learning_rate(low) * slack
    slack = exponent * (1 + 0.00005 / 0.0694)
    assert scaling.batch_tokens(low) / 4096 / slack - 96 < sequences < scaling.batch_tokens(high) / 4096 * slack + 96
    # The interval proves something: it is narrower than the step from one model to the next (a factor of 1.3).
    assert scaling.learning_rate(low) / scaling.learning_rate(high) < 1.12


@pytest.mark.parametrize(
    ("activation", "granularity", "flops", "published"),
    [(0.031, 12, 1e22, 6.875), (8 / 256, 8, 1e22, 6.515), (0.031, 8, 1e24, 10.40)],
)
def test_efficiency_leverage(activation, granularity, flops, published):
    assert scaling.leverage(activation, granularity, flops) == pytest.approx(published, abs=0.005)


def test_findings_of_the_paper_hold_in_the_law():
    at = scaling.leverage
    assert at(1 / 64, 12, 1e22) > at(1 / 32, 12, 1e22) > at(1 / 4, 12, 1e22)
    # For this law the granularity that leverage is greatest at lies where the derivative by ln G vanishes: exp(0.117 / 0.0334).
    best = max(range(1, 200), key=lambda g: at(1 / 32, g, 1e22))
    assert best == 33
    assert at(1 / 32, 8, 1e22) / at(1 / 32, best, 1e22) > 0.88  # and it is flat from there down to the 8 to 12 that Ling chose


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("flops", [1e18, 1e21, 1e24])
def test_model_times_tokens_is_the_budget(kind, flops):
    # The printed coefficients multiply to 1.0002 and 0.9994, the exponents add to 1.
    assert scaling.model_flops(flops, kind) * scaling.tokens(flops, kind) == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize(("flops", "within"), [(1e18, 0.35), (1e20, 0.1), (1e22, 0.1), (6e24, 0.1)])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_the_shape_is_near_the_wanted_size_and_buildable(flops, kind, within):
    """Widths go in steps of four heads: coarse for small models, where one step is a third of all FLOPs."""
    shape = scaling.shape_for(scaling.model_flops(flops, kind), kind)
    assert shape.flops_per_token == pytest.approx(scaling.model_flops(flops, kind), rel=within)
    c = shape.config
    assert c.num_attention_heads * c.head_dim == c.hidden_size
    assert c.num_attention_heads % 4 == 0
    assert c.num_hidden_layers % (c.layer_group_size or 1) == 0
    if kind == "moe":
        assert 2 * c.hidden_size / c.moe_intermediate_size == 8


def test_what_is_extrapolated_is_said():
    assert len(scaling.plan_budget(1e20).extrapolated) == 1
    assert len(scaling.plan_budget(1e23).extrapolated) == 2
    assert len(scaling.plan_budget(1e25).extrapolated) == 3


@pytest.mark.parametrize("flops", [0, -1, 1e14, 1e40, float("nan"), float("inf")])
def test_senseless_budgets_are_refused(flops):
    with pytest.raises(UserError) as caught:
        scaling.plan_budget(flops)
    assert caught.value.parts["where"] == "--budget"
