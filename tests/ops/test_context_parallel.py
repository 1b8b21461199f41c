"""Lightning over slices of a sequence on 2 and 4 processes against the recurrence on the whole sequence in one process.

All processes of a world are started once and go through every case. Each compares what it holds with the FP64 recurrence run on
the whole sequence. Tolerances, relative to the largest expected value: about 100 roundings in a row add up like 10 at random, of
1e-16 in FP64 and 6e-8 in FP32; with room for cancellation 1e-13 and 2e-6. In BF16 a result is rounded twice, before and after
what enters is added, each time by at most 2^-9, the first time of a value that may be some times the largest result: 2^-7.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from openling.ops import context_parallel
from openling.ops.context_parallel import context_slice, lightning_context_parallel
from openling.ops.lightning import lightning, lightning_recurrent

HEADS, DIM, VALUE_DIM = 3, 4, 6
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce", "scatter", "gather", "send", "recv", "barrier")


class Problem(NamedTuple):
    """A whole sequence, how it is cut, and the weights that make a loss of outputs and states."""

    bounds: list[int]
    documents: list[int] | None
    tensors: dict[str, torch.Tensor]
    dtype: torch.dtype


def problem(seed: int, world: int, *, packed: bool, initial: bool, dtype: torch.dtype) -> Problem:
    """Slices and documents end anywhere: equal slices, empty ones, documents without a token are all among them."""
    draw = random.Random(1000 + seed)
    tokens = draw.choice((world, 37, 61))
    batch = 1 if packed else draw.choice((1, 2))
    cuts = sorted(draw.randint(0, tokens) for _ in range(world - 1))
    if seed % 4 == 0:
        cuts = [tokens * r // world for r in range(1, world)]
    if seed % 4 == 1:
        cuts[0] = draw.choice((0, tokens))  # an empty first slice, or all later ones empty
    bounds = [0, *sorted(cuts), tokens]
    ends = sorted(draw.choice((draw.randint(0, tokens), draw.choice(bounds))) for _ in range(draw.randint(0, 4)))
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {name: normal(batch, tokens, HEADS, DIM) for name in "qk"} | {"v": normal(batch, tokens, HEADS, VALUE_DIM)}
    tensors["dout"] = normal(batch, tokens, HEADS, VALUE_DIM)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["decay"] = -torch.tensor([0.92, 0.05, 2e-4], dtype=torch.float64)  # the strongest and the weakest of Ling-2.6
    tensors["dstates"] = normal(batch, HEADS, DIM, VALUE_DIM)
    if seed % 5 < 2:  # a loss of the outputs or of the states alone
        tensors["dstates" if seed % 5 else "dout"].zero_()
    if initial:
        tensors["initial"] = normal(batch, HEADS, DIM, VALUE_DIM)
    return Problem(bounds, [0, *ends, tokens] if packed else None, tensors, dtype)


def expected(p: Problem) -> tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs, the state of every document after every slice, and gradients, all from recurrences over whole documents."""
    leaves = {name: p.tensors[name].double().requires_grad_() for name in ("q", "k", "v", "initial") if name in p.tensors}
    q, k, v, initial = (leaves.get(name) for name in ("q", "k", "v", "initial"))
    decay, tokens = p.tensors["decay"], p.bounds[-1]
    cu_seqlens = None if p.documents is None else torch.tensor(p.documents)
    out, _ = lightning_recurrent(q, k, v, decay, initial_state=initial, cu_seqlens=cu_seqlens)
    states, loss = {}, (out * p.tensors["dout"].double()).sum()
    spans = [(0, tokens)] if p.documents is None else list(zip(p.documents, p.documents[1:], strict=False))
    for rank, (start, end) in enumerate(zip(p.bounds, p.bounds[1:], strict=False)):
        for document, (first, last) in enumerate(spans):
            if p.documents is None or max(first, start) < min(last, end):
                part = slice(first, min(last, end))
                _, state = lightning_recurrent(q[:, part], k[:, part], v[:, part], decay, initial_state=initial)
                states[rank, document] = state
                loss = loss + (document + 1) * (state * p.tensors["dstates"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return out.detach(), states, dict(zip(leaves, grads, strict=True))


def error(found: torch.Tensor, wanted: torch.Tensor, whole: torch.Tensor) -> float:
    """Largest difference over the largest value expected on any rank."""
    assert found.shape == wanted.shape
    largest = (found.double() - wanted).abs().max() if wanted.numel() else torch.zeros(())
    return float(largest.detach() / whole.detach().abs().max().clamp(min=1e-300))


def check(p: Problem, rank: int, counted: dict[str, int], *, checkpointed: bool = False) -> None:
    """This rank's part of one problem: outputs, states, gradients, number of collectives."""
    held = context_slice(p.bounds, rank, cu_seqlens=p.documents)
    out_ref, states_ref, grads_ref = expected(p)
    mine = slice(held.start, held.end)
    inputs = {name: p.tensors[name][:, mine].clone().requires_grad_() for name in "qkv"}
    first = {"initial": p.tensors["initial"].to(torch.promote_types(p.dtype, torch.float32))} if "initial" in p.tensors else {}
    inputs |= {name: x.requires_grad_() for name, x in first.items() if rank == 0}

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, *initial = tensors
        decay = p.tensors["decay"].to(torch.promote_types(p.dtype, torch.float32))
        return lightning_context_parallel(q, k, v, decay, held, initial_state=initial[0] if initial else None)

    counted.clear()
    if checkpointed:
        out, states = checkpoint(run, *inputs.values(), use_reentrant=False)
    else:
        out, states = run(*inputs.values())
    assert sum(counted.values()) == 1, counted
    assert out.dtype == p.dtype
    documents = list(held.documents) if p.documents is not None else [0]
    weights = [(d + 1) * p.tensors["dstates"] for d in documents]
    dstates = torch.cat(weights) if weights else states.detach()
    counted.clear()
    results = [(out, p.tensors["dout"][:, mine]), (states, dstates.to(states.dtype))]
    results = [(x, given) for x, given in results if given.numel() == 0 or given.any()]
    grads = torch.autograd.grad([x for x, _ in results], list(inputs.values()), [given for _, given in results])
    assert sum(counted.values()) == (2 if checkpointed else 1), counted

    tolerance = TOLERANCE[p.dtype]
    assert error(out, out_ref[:, mine], out_ref) < tolerance
    wanted = [states_ref[rank, d] for d in documents]
    whole = torch.cat(list(states_ref.values()))
    assert error(states, torch.cat(wanted) if wanted else whole[:0], whole) < tolerance
    for (name, found), whole_grad in zip(zip(inputs, grads, strict=True), grads_ref.values(), strict=False):
        assert found.dtype == inputs[name].dtype
        wanted_grad = whole_grad if name == "initial" else whole_grad[:, mine]
        assert error(found, wanted_grad, whole_grad) < tolerance, name


def count_collectives() -> dict[str, int]:
    """Counts every call of a function of torch.distributed that moves data."""
    counted: dict[str, int] = {}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    for name in dir(dist):
        if (
            any(word in name for word in COLLECTIVES)
            and callable(getattr(dist, name))
            and not isinstance(getattr(dist, name), type)
        ):
            setattr(dist, name, counting(name, getattr(dist, name)))
    return counted


def all_cases(rank: int, world: int, rendezvous: str) -> None:
    """What every process runs."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=limit)
    try:
        counted = count_collectives()
        dtypes = [torch.float64] * 4 + [torch.float32] * 2 + [torch.bfloat16]
        for seed in range(42):
            packed, initial = seed % 3 != 0, seed % 6 == 0
            p = problem(seed, world, packed=packed, initial=initial, dtype=dtypes[seed % 7])
            context_parallel.WAITING_RANKS = 8 if seed // 7 % 2 else 0  # the order of one machine, and that of many
            try:
                check(p, rank, counted, checkpointed=seed % 10 == 9)
            except AssertionError as failed:
                raise AssertionError(f"seed {seed}, bounds {p.bounds}, documents {p.documents}, {p.dtype}: {failed}") from failed
        no_gradients_wanted(rank, world)
        gather_runs_beside_the_local_attention(rank, world, counted)
        refusals(rank, world)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def no_gradients_wanted(rank: int, world: int) -> None:
    p = problem(0, world, packed=False, initial=False, dtype=torch.float64)
    held = context_slice(p.bounds, rank)
    q, k, v = (p.tensors[name][:, held.start : held.end] for name in "qkv")
    out, _ = lightning_context_parallel(q, k, v, p.tensors["decay"], held)
    assert not out.requires_grad
    whole, _ = lightning_recurrent(*(p.tensors[name] for name in "qkv"), p.tensors["decay"])
    assert error(out, whole[:, held.start : held.end], whole) < 1e-12


def gather_runs_beside_the_local_attention(rank: int, world: int, counted: dict[str, int]) -> None:
    """The collective has been issued, and not waited for, when the local attention starts."""
    held = context_slice([16 * r for r in range(world + 1)], rank)
    q, k, v = (torch.ones(1, 16, HEADS, DIM) for _ in range(3))
    seen = []

    def local(*args: Any, **kwargs: Any) -> Any:
        seen.append((sum(counted.values()), waits["n"]))
        return lightning(*args, **kwargs)

    waits = {"n": 0}
    real = context_parallel._Gather.folded

    def folded(self: Any, *args: Any) -> Any:
        waits["n"] += 1
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_parallel, "WAITING_RANKS", 0)
        patch.setattr(context_parallel, "lightning", local)
        patch.setattr(context_parallel._Gather, "folded", folded)
        counted.clear()
        out, _ = lightning_context_parallel(q.requires_grad_(), k, v, -torch.ones(HEADS), held)
        assert seen == [(1, 0)]
        out.sum().backward()
        assert seen[1:] == [(2, 1)]


def refusals(rank: int, world: int) -> None:
    held = context_slice([2 * r for r in range(world + 1)], rank)
    q = torch.ones(1, 2, HEADS, DIM)
    decay = -torch.ones(HEADS)
    other = context_slice([2 * r for r in range(world + 1)], (rank + 1) % world)
    with pytest.raises(ValueError, match="was given to rank"):
        lightning_context_parallel(q, q, q, decay, other)
    with pytest.raises(ValueError, match="holds 2 tokens, got 1"):
        lightning_context_parallel(q[:, :1], q[:, :1], q[:, :1], decay, held)
    with pytest.raises(ValueError, match="constant"):
        lightning_context_parallel(q, q, q, decay.clone().requires_grad_(), held)
    if rank:
        with pytest.raises(ValueError, match="belongs to rank 0"):
            lightning_context_parallel(q, q, q, decay, held, initial_state=torch.ones(1, HEADS, DIM, DIM))


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_slices_equal_the_whole(world: int, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["openling.ops.context_parallel", "torch.distributed"])  # imported once for all
    mp.start_processes(all_cases, args=(world, str(tmp_path / "rendezvous")), nprocs=world, start_method="forkserver")


def test_slices_of_packed_documents() -> None:
    """Documents 0-5, 5-5, 5-12, 12-20 on ranks 0-8, 8-8, 8-15, 15-20."""
    slices = [context_slice([0, 8, 8, 15, 20], rank, cu_seqlens=[0, 5, 5, 12, 20]) for rank in range(4)]
    assert [s.documents for s in slices] == [(0, 2), (), (2, 3), (3,)]
    assert [s.cu_seqlens.tolist() for s in slices if s.cu_seqlens is not None] == [[0, 5, 8], [0], [0, 4, 7], [0, 5]]
    assert [(s.first_tokens, s.last_tokens) for s in slices] == [(5, 3), (0, 0), (4, 3), (5, 5)]
    assert [(s.before, s.after) for s in slices] == [
        (slice(0, 0), slice(1, 3)),
        (slice(1, 1), slice(2, 2)),
        (slice(0, 2), slice(3, 4)),
        (slice(2, 3), slice(4, 4)),
    ]
    assert slices[0].distance_after.tolist() == [0, 0]
    assert slices[2].distance_before.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("bounds", "rank", "documents", "message"),
    [
        ([0, 4, 3], 0, None, "must rise from 0"),
        ([1, 4], 0, None, "must rise from 0"),
        ([0, 4, 8], 2, None, "rank 2 is none of the 2"),
        ([0, 4, 8], 0, [0, 4, 7], "from 0 to 8"),
        ([0, 4, 8], 0, [0, 6, 4, 8], "from 0 to 8"),
        ([0, 4, 8], 0, [1, 8], "from 0 to 8"),
    ],
)
def test_wrong_slices(bounds: list[int], rank: int, documents: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context_slice(bounds, rank, cu_seqlens=documents)
