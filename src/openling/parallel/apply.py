"""A model of one device onto a mesh, always in the same order: tensor, expert, context, recompute, compile, FSDP.

A world of one rank leaves the model as it is. Otherwise parameters become this rank's parts (`table`), modules that must talk to
other ranks change their class, and FSDP2 shards what is left. The loop deals with one object:

    parallel = apply(model, build(Axes(context=2), model.config, "cuda"), model_dtype=torch.bfloat16)
    part = parallel.part(rows, cu_seqlens)             this rank's slice; rows are those of its data rank
    counts = parallel.summed(objective.counts(model, part))
    losses = parallel.run(lambda: objective(model, part, counts, tensor_group=parallel.tensor_group))
    losses.loss.backward()
    norm = parallel.clip(1.0)                          also completes gradients: call it before every step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from openling.model.ling import Layer, Ling, SparseMoE
from openling.parallel.context import Part, part_of
from openling.parallel.expert import shard_experts
from openling.parallel.mesh import Mesh
from openling.parallel.recompute import Recompute, recompute
from openling.parallel.table import Held, holdings, take_parts
from openling.parallel.tensor import split_over

T = TypeVar("T")


class Parallel:
    """A model on a mesh, and what a training loop asks of it. Without a mesh everything is local and the model plain."""

    def __init__(self, model: Ling, mesh: Mesh | None, parts: dict[str, Held]) -> None:
        self.model, self.mesh, self.parts = model, mesh, parts
        self.tensor_group = None if mesh is None or mesh.axes.tensor == 1 else mesh.group("tensor")
        self.context_group = None if mesh is None or mesh.axes.context == 1 else mesh.group("context")

    def part(self, rows_BS: Tensor, cu_seqlens: Tensor | Sequence[int] | None = None) -> Part:
        """This rank's slice of the rows of its data rank."""
        return part_of(rows_BS, cu_seqlens, self.context_group)

    def run(self, compute: Callable[[], T]) -> T:
        """Call `compute`, which may use the model in any way, embedding and head included; backward may follow on its tensors."""
        if isinstance(self.model, FSDPModule):
            return self.model.run(compute)  # type: ignore[operator]
        return compute()

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks with other tokens: counts, losses, tokens per expert."""
        if self.mesh is None:
            return x
        out = x.clone()
        dist.all_reduce(out, group=self.mesh.group("data"))
        return out

    def last_of_step(self, last: bool) -> None:
        """Say before each backward whether it is the step's last: earlier ones keep gradients whole and send nothing."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)

    def local_gradients(self) -> dict[str, Tensor]:
        """This rank's part of every gradient."""
        named = self.model.named_parameters()
        return {name: _local(p.grad) for name, p in named if p.grad is not None}

    def clip(self, limit: float) -> Tensor:
        """Complete the gradients, scale them to a norm of at most `limit`, and return their norm before that, FP32 or FP64."""
        gradients = self.local_gradients()
        self._complete(gradients)
        norm = self._norm(gradients)
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    def _complete(self, gradients: dict[str, Tensor]) -> None:
        """Sum the gradients of copies that each tensor rank used for its own heads."""
        mine = [g for name, g in gradients.items() if self.parts and self.parts[name].partial]
        if not mine or self.tensor_group is None:
            return
        flat = torch.cat([g.flatten() for g in mine])
        dist.all_reduce(flat, group=self.tensor_group)
        for gradient, new in zip(mine, flat.split([g.numel() for g in mine]), strict=True):
            gradient.copy_(new.view_as(gradient))

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Of all ranks' parts, each counted once."""
        device = next(self.model.parameters()).device
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients.values()) else torch.float32
        total = torch.zeros((), dtype=wide, device=device)
        for name, gradient in gradients.items():
            total += torch.linalg.vector_norm(gradient, dtype=wide).square() / self._copies(name)
        if self.mesh is not None:
            dist.all_reduce(total)
        return total.sqrt()

    def _copies(self, name: str) -> int:
        """How many ranks of the world hold the same part of a parameter."""
        if self.mesh is None:
            return 1
        return self.mesh.axes.data_replicate * self.parts[name].copies


def apply(
    model: Ling,
    mesh: Mesh | None,
    *,
    recomputing: Recompute = "none",
    compiled: bool = False,
    model_dtype: torch.dtype | None = None,
) -> Parallel:
    """Put a whole model (on its device, or on "meta") onto the mesh, in place.

    model_dtype: what gathered weights are cast to; None keeps their own dtype. Gradients are summed in the parameters' dtype.
    """
    config = model.config
    alone = mesh is None or mesh.axes.world == 1
    if alone or mesh is None:
        recompute(model, recomputing)
        _compile(model, compiled)
        return Parallel(model, None, {})
    axes = mesh.axes
    parts = holdings(model, config, (mesh.rank("tensor"), axes.tensor), (mesh.rank("expert"), axes.expert))
    take_parts(model, parts)
    if axes.tensor > 1:
        split_over(model, mesh.group("tensor"))
    if axes.tensor > 1 or axes.expert > 1:
        for moe in _sparse(model):
            shard_experts(
                moe,
                mesh.group("expert") if axes.expert > 1 else None,
                mesh.group("tensor") if axes.tensor > 1 else None,
            )
    recompute(model, recomputing)
    _compile(model, compiled)
    if axes.data_replicate * axes.shards > 1:
        _shard(model, mesh, model_dtype)
    return Parallel(model, mesh, parts)


def _shard(model: Ling, mesh: Mesh, model_dtype: torch.dtype | None) -> None:
    """FSDP2: a group per layer, one for its experts where these are split already, and the rest in the root's."""
    axes = mesh.axes
    dims = ("data_replicate", "shard") if axes.data_replicate > 1 else ("shard",)
    policy = MixedPrecisionPolicy(
        param_dtype=model_dtype, reduce_dtype=next(model.parameters()).dtype if model_dtype else None, cast_forward_inputs=False
    )
    sharded: list[Any] = []
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        if axes.expert > 1 and isinstance(layer.mlp, SparseMoE):
            sharded.append(fully_shard(layer.mlp.experts, mesh=mesh.experts[dims], mp_policy=policy))
        sharded.append(fully_shard(layer, mesh=mesh.dense[dims], mp_policy=policy))
    sharded.append(fully_shard(model, mesh=mesh.dense[dims], mp_policy=policy))
    for module in sharded:
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are shares of a mean over all ranks' tokens: gradients add up
        module.set_force_sum_reduction_for_comms(True)
    model.run = lambda compute: compute()  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run")


def _sparse(model: Ling) -> list[SparseMoE]:
    return [m for m in model.modules() if isinstance(m, SparseMoE)]


def _compile(model: Ling, compiled: bool) -> None:
    if compiled:
        for layer in model.model.layers:
            layer.compile()


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
