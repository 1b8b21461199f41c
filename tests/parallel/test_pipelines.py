"""Pipelines on 2 and 4 processes: loss, gradients, optimiser steps and checkpoints equal those of one rank.

As in `test_parallel_worlds`: FP64, and every world is started once.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from world_cases import CONFIG, DENSE, LOSSES, Batch, altered, held_pieces, model_of, reference_loss, worst

from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.model.ling import Ling, SparseMoE
from openling.parallel.apply import Parallel, apply
from openling.parallel.mesh import Axes, build
from openling.parallel.pieces import load, save
from openling.parallel.recompute import Recompute
from openling.plan.stages import stage_layers
from openling.train.objective import counts, objective_of, prepare, to_device

CLIP, SEQ_LEN = 0.5, 16
# More layers than stages, of unequal costs: the first two are dense and wide.
LONG = CONFIG.replace(
    num_hidden_layers=7,
    layer_kinds=("lightning", "mla", "lightning", "gqa", "lightning", "lightning", "mla"),
    moe_layers=(2, 3, 4, 5, 6),
    intermediate_size=64,
)


@dataclass(frozen=True)
class Case:
    """What is left of the world is data_shard."""

    axes: Axes
    config: ModelConfig
    parts: int
    stages: int = 1
    recomputing: Recompute = "none"
    turns: bool = False
    """Whether packed parts and whole rows take turns; otherwise all are packed."""


CASES = {
    2: [
        Case(Axes(pipeline=2), CONFIG, 3),
        Case(Axes(pipeline=2), DENSE, 2, recomputing="layer"),
        Case(Axes(pipeline=2), LONG, 4, stages=2, turns=True),
    ],
    4: [
        Case(Axes(pipeline=4), LONG, 5, turns=True),
        Case(Axes(pipeline=2, data_replicate=2), DENSE, 2, turns=True),
        Case(Axes(pipeline=2, tensor=2), CONFIG, 2),
        Case(Axes(pipeline=2, context=2, expert=2), CONFIG, 2, recomputing="layer"),
    ],
}
if os.environ.get("OPENLING_ALL_MESHES"):  # what the others hold in other pairs
    CASES[4] += [
        Case(Axes(pipeline=2), LONG, 3, recomputing="selective"),
        Case(Axes(pipeline=2), DENSE, 3, stages=2, recomputing="layer"),
        Case(Axes(pipeline=2, tensor=2), DENSE, 2),
    ]
# A checkpoint of one mesh, read on another and by one rank alone.
SAVED = {2: [(Axes(pipeline=2), Axes(expert=2))], 4: [(Axes(pipeline=2, tensor=2), Axes(pipeline=4)), (Axes(), Axes(pipeline=2))]}


def test_an_uneven_model_is_cut_by_cost() -> None:
    """As the cases below run it: the head's stage has the fewest layers, and the MTP layer."""
    assert stage_layers(LONG, 2, SEQ_LEN) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stage_layers(LONG, 4, SEQ_LEN) == [[0], [1, 2], [3, 4], [5, 6, 7]]


def parts_of(case: Case, data_ranks: int) -> list[list[Batch]]:
    """The parts of each data rank: other lengths, that nothing divides; documents end anywhere."""
    draw, found = random.Random(3), []
    for rank in range(data_ranks):
        tokens = 26 if case.turns else 19 + 4 * rank
        found.append([_part(draw, tokens, packed=not case.turns or k % 2 == 0) for k in range(case.parts)])
    return found


def _part(draw: random.Random, tokens: int, *, packed: bool) -> Batch:
    ids = torch.tensor([draw.randrange(CONFIG.vocab_size) for _ in range(tokens)])
    ends = sorted({draw.randrange(1, tokens) for _ in range(3)})
    return Batch(ids[None], [0, *ends, tokens]) if packed else Batch(ids.view(2, -1), None)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """With an eps that keeps rounding of tiny gradients from becoming steps of full size."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-4)


def step(parallel: Parallel, batches: list[Batch]) -> Tensor:
    """This data rank's share of the loss."""
    assert parallel.pipeline is not None
    parts = [to_device(prepare(b.packed, 1, parallel.context_group), torch.device("cpu")) for b in batches]
    total = parallel.summed(counts(parts))

    def finish(number: int, h: Tensor) -> tuple[Tensor, Tensor]:
        loss = objective_of(h, parallel.model, parts[number], total, LOSSES, tensor=parallel.tensor_group)
        return loss.loss, torch.stack((loss.loss, loss.ce)).detach()

    loss, (again, next_token) = parallel.pipeline.step(parts, finish, 2)
    assert float(loss) == pytest.approx(float(again)) and 0 < float(next_token) < float(loss)
    return loss


def check(case: Case) -> None:
    mesh = build(case.axes, case.config, "cpu")
    everything = parts_of(case, mesh.data_ranks)
    model, plain = model_of(case.config), model_of(case.config)
    parallel = apply(model, mesh, recomputing=case.recomputing, stages_per_rank=case.stages, seq_len=SEQ_LEN)
    held, whole = parallel.held(dict(model.named_parameters())), dict(plain.named_parameters())
    optimizers = adamw(held.values()), adamw(whole.values())
    for _ in range(2):
        wanted = reference_loss(plain, [part for parts in everything for part in parts])
        wanted.backward()
        norm = nn.utils.clip_grad_norm_(whole.values(), CLIP)
        assert float(parallel.summed(step(parallel, everything[mesh.data_rank]))) == pytest.approx(wanted.item(), rel=1e-12)
        assert float(parallel.clip(held, CLIP)) == pytest.approx(float(norm), rel=1e-10)
        equal(parallel, *({name: p.grad for name, p in tensors.items() if p.grad is not None} for tensors in (held, whole)))
        loads, expected = tokens_per_expert(model), tokens_per_expert(plain)
        assert everywhere(loads) == expected.keys()
        assert all(torch.equal(parallel.summed(load), expected[name]) for name, load in loads.items())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        equal(parallel, *({name: p.detach() for name, p in tensors.items()} for tensors in (held, whole)))


def tokens_per_expert(model: Ling) -> dict[str, Tensor]:
    """And forget them."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, SparseMoE):
            assert m.tokens_E is not None
            found[name], m.tokens_E = m.tokens_E, None
    return found


def everywhere(found: dict[str, Tensor]) -> set[str]:
    """The names of all stages. A rank of several shards may hold no row of a matrix."""
    names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, set(found))
    return set().union(*names)


def equal(parallel: Parallel, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """What stages hold, under the names of the whole model, is what it holds."""
    assert found and everywhere(found) == wanted.keys()
    worst(parallel, found, wanted)


def refusals() -> None:
    """Of what a pipeline cannot do, by name; every rank says so alike, and goes on."""
    mesh = build(Axes(pipeline=2), LONG, "cpu")
    with pytest.raises(UserError, match="1 to 3"):
        apply(model_of(LONG), mesh, stages_per_rank=4)
    rows = Batch(torch.zeros(2, 13, dtype=torch.long), None)
    interleaved, plain = (apply(model_of(LONG), mesh, stages_per_rank=n) for n in (2, 1))
    with pytest.raises(UserError, match="fewer parts"):
        step(plain, [rows])
    with pytest.raises(UserError, match="equally many tokens"):
        step(plain, [rows, Batch(rows.rows[:1], None)])
    with pytest.raises(UserError, match="a multiple of 2 parts"):
        step(interleaved, [rows] * 5)


def autocast_is_for_forward_alone() -> None:
    """Losses are those of one rank under autocast, BF16 products and all, and nothing in backward sees it."""
    seen: list[bool] = []
    parallel = apply(model_of(DENSE).float(), build(Axes(pipeline=2), DENSE, "cpu"))
    p = next(p for p in parallel.model.parameters() if p.dim() == 1)
    p.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
    rows = parts_of(Case(Axes(), DENSE, 2, turns=True), 1)[0]
    plain = model_of(DENSE).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, wanted = float(step(parallel, rows)), reference_loss(plain, rows).item()
        assert torch.is_autocast_enabled("cpu")
    assert seen and not any(seen)
    assert loss == pytest.approx(wanted, rel=1e-3)
    assert loss != pytest.approx(reference_loss(plain, rows).item(), rel=1e-6)


def checkpoints(first: Axes, second: Axes, folder: Path) -> None:
    """Saved on one mesh and loaded into models of other numbers on other meshes: the same tensors bit for bit."""
    saved = apply(model_of(CONFIG), build(first, CONFIG, "cpu"))
    save(folder, held_pieces(saved), dist.group.WORLD)
    whole, other = apply(altered(), None), apply(altered(), build(second, CONFIG, "cpu"))
    for loaded in (whole, other):
        load(folder, held_pieces(loaded))
    wanted = {name: p.detach() for name, p in model_of(CONFIG).named_parameters()}
    assert all(torch.equal(p, wanted[name]) for name, p in whole.model.named_parameters())
    found = {name: p.detach() for name, p in other.held(dict(other.model.named_parameters())).items()}
    assert worst(other, found, wanted) == 0


def all_cases(rank: int, world: int, folder: str) -> None:
    """What every process runs."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=limit)
    try:
        for case in CASES[world]:
            try:
                check(case)
            except Exception as failed:
                raise AssertionError(f"{replace(case, config=None)}: {failed}") from failed  # type: ignore[arg-type]
        for k, (first, second) in enumerate(SAVED[world]):
            checkpoints(first, second, Path(folder) / f"saved-{k}")
        if world == 2:
            refusals()
            autocast_is_for_forward_alone()
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_every_pipeline_equals_one_rank(world: int, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["openling.parallel.pieces", "openling.train.objective"])  # imported once for all
    mp.start_processes(all_cases, args=(world, str(tmp_path)), nprocs=world, start_method="forkserver")
