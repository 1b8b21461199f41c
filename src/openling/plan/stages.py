"""Which layers each stage of a pipeline holds: the plan and training read it here. No torch."""

from __future__ import annotations

import math

from openling.model.config import ModelConfig
from openling.model.count import forward_flops


def stage_layers(c: ModelConfig, count: int, seq_len: int) -> list[list[int]]:
    """Runs of hidden layers for each stage, balanced by forward FLOPs; the last one has head and MTP layers besides."""
    runs = _balanced(layer_costs(c, seq_len), count)
    return [*runs[:-1], [*runs[-1], *range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)]]


def layer_costs(c: ModelConfig, seq_len: int) -> list[float]:
    """Forward FLOPs per token of every hidden layer; the last carries head and MTP."""
    head = 2 * c.vocab_size * c.hidden_size
    known: dict[tuple[str, bool], float] = {}

    def alone(layer: int) -> float:
        kind = (c.layer_kind(layer), c.is_moe(layer))
        if kind not in known:
            one = c.replace(
                num_hidden_layers=1, layer_kinds=(kind[0],), moe_layers=(0,) if kind[1] else (), num_nextn_predict_layers=0
            )
            known[kind] = float(forward_flops(one, seq_len // 2).total - head)
        return known[kind]

    hidden = c.num_hidden_layers
    costs = [alone(i) for i in range(hidden)]
    costs[-1] += head + sum(alone(hidden + k) + head for k in range(c.num_nextn_predict_layers))
    return costs


def _balanced(costs: list[float], count: int) -> list[list[int]]:
    """`count` contiguous runs, none empty, of costs as equal as can be: the least sum of fourth powers."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost / sum(costs))
    best = [x**4 for x in total]  # best[end]: of one run up to there
    starts: list[list[int]] = []
    for run in range(1, count):
        found = [
            min(((best[a] + (total[b] - total[a]) ** 4, a) for a in range(run, b)), default=(math.inf, 0))
            for b in range(len(total))
        ]
        best = [value for value, _ in found]
        starts.append([start for _, start in found])
    bounds = [len(costs)]
    for row in reversed(starts):
        bounds.append(row[bounds[-1]])
    bounds = [*bounds, 0][::-1]
    return [list(range(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
