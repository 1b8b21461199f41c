"""Loss, gradients, optimiser steps and checkpoints of every axis and useful pair on 2 and 4 processes equal those of one rank.

All processes of a world are started once and go through every case. FP64: some hundred roundings of 1e-16, times what a
normalised layer may amplify: 1e-10 relative to a tensor's largest value is far above what comes out (about 1e-14).
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from world_cases import CONFIG, DENSE, LOSSES, Batch, altered, batches, held_pieces, model_of, reference_loss, worst

from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.parallel.apply import Parallel, apply
from openling.parallel.fill import fill, give_memory
from openling.parallel.mesh import Axes, build
from openling.parallel.pieces import load, save
from openling.parallel.recompute import Recompute
from openling.train.objective import counts, objective, prepare, to_device

CLIP, STEPS = 0.5, 2
# Axes, model, whether rows are packed, recomputing; what is left of the world is data_shard.
CASES: dict[int, list[tuple[Axes, ModelConfig, bool, Recompute]]] = {
    2: [
        (Axes(), CONFIG, True, "none"),
        (Axes(data_replicate=2), DENSE, False, "layer"),
        (Axes(context=2), CONFIG, True, "layer"),
        (Axes(context=2), DENSE, False, "selective"),
        (Axes(expert=2), CONFIG, False, "selective"),
        (Axes(tensor=2), CONFIG, True, "none"),
        (Axes(tensor=2), DENSE, False, "layer"),
    ],
    4: [
        (Axes(data_replicate=2, expert=2), CONFIG, False, "none"),
        (Axes(context=2), CONFIG, True, "none"),
        (Axes(context=2, expert=4), CONFIG, True, "layer"),
        (Axes(tensor=2), CONFIG, True, "none"),
        (Axes(tensor=2, context=2), CONFIG, False, "none"),
    ],
}
# A checkpoint of one mesh, read on another and by one rank alone.
SAVED = {2: (Axes(tensor=2), Axes(expert=2)), 4: (Axes(tensor=2, expert=2), Axes(expert=4))}


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """With an eps that keeps rounding of tiny gradients from becoming steps of full size."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-4)


@cache
def reference(config: ModelConfig, data_ranks: int, packed: bool) -> Reference:
    return Reference(config, batches(data_ranks, packed=packed, seed=data_ranks))


class Reference:
    """Losses, gradients and parameters of one rank's training, step by step."""

    def __init__(self, config: ModelConfig, everything: list[Batch]) -> None:
        model = model_of(config)
        optimizer = adamw(model.parameters())
        self.losses, self.norms, self.gradients, self.parameters, self.counted = [], [], [], [], []
        for _ in range(STEPS):
            loss = reference_loss(model, everything)
            loss.backward()
            self.counted.append(
                {name: m.tokens_E for name, m in model.named_modules() if getattr(m, "tokens_E", None) is not None}
            )
            for name in self.counted[-1]:
                model.get_submodule(name).tokens_E = None
            self.losses.append(loss.item())
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
            self.parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})


def step(parallel: Parallel, held: dict[str, nn.Parameter], batch: Batch) -> tuple[float, float]:
    """Loss over all ranks, and the gradients' norm before they were clipped."""
    model, group = parallel.model, parallel.tensor_group
    part = to_device(prepare(batch.packed, 1, parallel.context_group), torch.device("cpu"))
    total = parallel.summed(counts([part]))
    loss = parallel.run(lambda: objective(model, part, total, LOSSES, tensor=group)).loss
    loss.backward()
    return float(parallel.summed(loss.detach())), float(parallel.clip(held, CLIP))


def check(axes: Axes, config: ModelConfig, packed: bool, recomputing: Recompute) -> None:
    mesh = build(axes, config, "cpu")
    everything = batches(mesh.data_ranks, packed=packed, seed=mesh.data_ranks)
    expected = reference(config, mesh.data_ranks, packed)
    model = model_of(config)
    parallel = apply(model, mesh, recomputing=recomputing)
    held = parallel.held(dict(model.named_parameters()))
    optimizer = adamw(held.values())
    for k in range(STEPS):
        loss, norm = step(parallel, held, everything[mesh.data_rank])
        assert loss == pytest.approx(expected.losses[k], rel=1e-12)
        assert norm == pytest.approx(expected.norms[k], rel=1e-10)
        worst(parallel, {name: p.grad for name, p in held.items() if p.grad is not None}, expected.gradients[k])
        optimizer.step()
        optimizer.zero_grad()
        worst(parallel, {name: p.detach() for name, p in held.items()}, expected.parameters[k])
        for name, counted in expected.counted[k].items():
            assert torch.equal(parallel.summed(model.get_submodule(name).tokens_E), counted), name
            model.get_submodule(name).tokens_E = None


def checkpoints(world: int, folder: Path) -> None:
    """Saved on one mesh and loaded into models of other numbers on other meshes: the same tensors bit for bit."""
    first, second = SAVED[world]
    parallel = applied(first)
    save(folder / "saved", held_pieces(parallel), dist.group.WORLD)
    whole, other = apply(altered(), None), applied(second, altered())
    for loaded in (whole, other):
        load(folder / "saved", held_pieces(loaded))
    wanted = {name: p.detach() for name, p in whole.model.named_parameters()}
    assert all(torch.equal(p, wanted[name]) for name, p in model_of(CONFIG).named_parameters())
    for held in (other, parallel):
        found = {name: p.detach() for name, p in held.held(dict(held.model.named_parameters())).items()}
        assert worst(held, found, wanted) == 0


def from_meta(world: int) -> None:
    """Put on the mesh without memory, then filled: the same parts, uneven and empty ones too, and the same first step."""
    for config in (CONFIG.replace(q_lora_rank=9, kv_lora_rank=10), DENSE):
        with torch.device("meta"):
            model = Ling(config).double()
        parallel = apply(model.train(), build(Axes(), config, "cpu"))
        give_memory(parallel, torch.device("cpu"))
        state = model_of(config).state_dict()
        fill(parallel, lambda name, shape, state=state: state[name])
        held = parallel.held(dict(model.named_parameters()))
        assert worst(parallel, {name: p.detach() for name, p in held.items()}, state) == 0
        expected, everything = reference(config, world, False), batches(world, packed=False, seed=world)
        loss, norm = step(parallel, held, everything[dist.get_rank()])
        assert loss == pytest.approx(expected.losses[0], rel=1e-12)
        assert norm == pytest.approx(expected.norms[0], rel=1e-10)
        worst(parallel, {name: p.grad for name, p in held.items() if p.grad is not None}, expected.gradients[0])


def applied(axes: Axes, model: Ling | None = None) -> Parallel:
    return apply(model or model_of(CONFIG), build(axes, CONFIG, "cpu"))


def all_cases(rank: int, world: int, folder: str) -> None:
    """What every process runs."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=limit)
    try:
        for case in CASES[world]:
            try:
                check(*case)
            except Exception as failed:
                raise AssertionError(f"{case[0]}, {'packed' if case[2] else 'rows'}, recomputing {case[3]}: {failed}") from failed
        checkpoints(world, Path(folder))
        from_meta(world)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_every_mesh_equals_one_rank(world: int, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["openling.parallel.pieces", "openling.train.objective"])  # imported once for all
    mp.start_processes(all_cases, args=(world, str(tmp_path)), nprocs=world, start_method="forkserver")
