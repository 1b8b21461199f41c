"""Meshes that cannot be, the placement table, and parts of tensors; no processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from world_cases import CONFIG, DENSE, LOSSES, batches, model_of, reference_loss

from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.parallel.apply import apply
from openling.parallel.mesh import Axes, check, fit
from openling.parallel.pieces import load, pieces, save
from openling.parallel.recompute import recompute
from openling.parallel.table import Run, holdings, split, within
from openling.plan.table import TABLE, placement
from openling.train.objective import counts, objective, prepare


@pytest.mark.parametrize(
    ("axes", "world", "where", "expected"),
    [
        (Axes(data_shard=3), 4, "data_shard", "4, which the other axes leave"),
        (Axes(context=3), 4, "context", "divisors of 4"),
        (Axes(tensor=8), 4, "tensor", "divisors of 4"),
        (Axes(tensor=0), 4, "tensor", "1 or more"),
        (Axes(data_shard=-1), 4, "data_shard", "0 or more"),
    ],
)
def test_axes_that_do_not_make_a_world(axes: Axes, world: int, where: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"where: ") as raised:
        fit(axes, world)
    assert raised.value.parts["where"] == where
    assert expected in str(raised.value.parts["expected"])


def test_what_is_left_is_sharded() -> None:
    assert fit(Axes(context=2, tensor=2), 16).data_shard == 4
    assert fit(Axes(), 1).world == 1


@pytest.mark.parametrize(
    ("axes", "config", "where", "why", "nearest"),
    [
        (Axes(data_shard=1, tensor=8), CONFIG, "tensor", "num_attention_heads", 4),
        (Axes(data_shard=1, tensor=4), CONFIG.replace(group_norm_size=2), "tensor", "group_norm_size", 2),
        (Axes(data_shard=1, tensor=4), DENSE, "tensor", "num_key_value_heads", 2),
        (Axes(data_shard=1, tensor=4), CONFIG.replace(vocab_size=50), "tensor", "vocab_size", 2),
        (Axes(data_shard=1, tensor=4), CONFIG.replace(moe_intermediate_size=6), "tensor", "moe_intermediate_size", 3),
        (Axes(data_shard=3, expert=3), CONFIG, "expert", "8 experts", 2),
        (Axes(data_shard=2, expert=4), CONFIG, "expert", "data_shard x context", 2),
        (Axes(data_shard=2, expert=2), DENSE, "expert", "no experts", 1),
        (Axes(data_shard=1, pipeline=5), CONFIG, "pipeline", "no layer", 4),
    ],
)
def test_models_that_cannot_be_cut_so(axes: Axes, config: ModelConfig, where: str, why: str, nearest: int | None) -> None:
    with pytest.raises(UserError, match=why) as raised:
        check(axes, config)
    assert raised.value.parts["where"] == where
    assert raised.value.parts["nearest"] == nearest


@pytest.mark.parametrize("config", [CONFIG, DENSE])
def test_every_parameter_has_a_row_and_parts_make_it_up(config: ModelConfig) -> None:
    model = model_of(config)
    parts = [holdings(model, config, (t, 2), (e, 2)) for t in range(2) for e in range(2)]
    for name, p in model.named_parameters():
        seen = torch.zeros(p.shape)
        for part in parts:
            held = part[name]
            index = torch.meshgrid(*(torch.cat([torch.arange(r.start, r.start + r.length) for r in runs]) for runs in held.runs))
            seen[index] += 1
            assert torch.equal(held.take(p), p[index]), name
        copies = (1 if placement(name).tensor is not None else 2) * (1 if placement(name).expert else 2)
        assert torch.equal(seen, torch.full_like(seen, copies)), name


def test_no_row_is_in_vain() -> None:
    names = [name for config in (CONFIG, DENSE) for name, _ in model_of(config).named_parameters()]
    used = {id(placement(name)) for name in names}
    assert all(id(row) in used for _, row in TABLE)
    with pytest.raises(KeyError, match=r"plan/table\.py"):
        placement("model.layers.0.attention_gate.weight")


def test_runs() -> None:
    runs = split([8, 4, 4], 2, 1)
    assert runs == [Run(0, 4, 4), Run(4, 10, 2), Run(6, 14, 2)]
    assert within(runs, 3, 7) == [Run(0, 7, 1), Run(1, 10, 2), Run(3, 14, 1)]


def test_one_rank_is_the_plain_model(tmp_path: Path) -> None:
    """Nothing is replaced, and loss and gradients are those of the plain model with the plain loss."""
    batch, model = batches(1, packed=False, seed=3)[0], model_of(CONFIG)
    kinds = [type(m) for m in model.modules()]
    parallel = apply(model, None)
    assert parallel.model is model and [type(m) for m in model.modules()] == kinds
    part = prepare(batch.packed, 1)
    assert part.memory is None and part.cu_seqlens is None
    total = parallel.summed(counts([part]))
    losses = parallel.run(lambda: objective(model, part, total, LOSSES))
    losses.loss.backward()
    wanted = reference_loss(other := model_of(CONFIG), [batch])
    wanted.backward()
    assert losses.loss.item() == pytest.approx(wanted.item(), rel=1e-13)
    norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters() if p.grad is not None])
    held = parallel.held(dict(model.named_parameters()))
    assert float(parallel.clip(held, 1.0)) == pytest.approx(float(norm), rel=1e-12)
    save(tmp_path / "one", pieces(parallel, {f"model/{name}": p.detach() for name, p in held.items()}), None)
    load(tmp_path / "one", pieces(apply(other, None), {f"model/{name}": p.detach() for name, p in other.named_parameters()}))


@pytest.mark.parametrize("policy", ["layer", "selective"])
def test_recomputing_changes_nothing(policy: str) -> None:
    """Bit for bit, and tokens per expert are counted once."""
    batch = batches(1, packed=False, seed=4)
    once, again = model_of(CONFIG), model_of(CONFIG)
    recompute(again, policy)  # type: ignore[arg-type]
    for model in (once, again):
        reference_loss(model, batch).backward()
    for (name, p), q in zip(once.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name
    counted = [m.tokens_E for m in once.modules() if getattr(m, "tokens_E", None) is not None]
    assert len(counted) == 4
    assert all(
        torch.equal(a, b) for a, b in zip(counted, [m.tokens_E for m in again.modules() if hasattr(m, "tokens_E")], strict=True)
    )
