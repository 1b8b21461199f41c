"""A model of one device onto a mesh, always in the same order: tensor, expert, context, recompute, compile, pipeline, FSDP.

A world of one rank leaves the model as it is. Otherwise parameters become this rank's parts (`table`), modules that must talk to
other ranks change their class, and FSDP2 shards what is left. The training loop deals with one object:

    parallel = apply(model, build(Axes(context=2), model.config, "cuda"), model_dtype=torch.bfloat16)
    held = parallel.held(dict(model.named_parameters()))    for the optimiser: plain tensors
    parallel.run(compute).backward()
    norm = parallel.clip(held, 1.0)                         also completes gradients: call it before every step

A pipeline has `parallel.pipeline.step` in place of `run`: forward and backward of all parts of a step at once.

How FP32 weights under BF16 autocast meet FSDP. Left alone, each rank would gather FP32 and autocast would keep a BF16 copy of
every gathered matrix until backward, whatever FSDP frees. So with `model_dtype` the matrices of layers are cast before they are
sent: the bits that autocast would have made, half the bytes, nothing kept. What autocast leaves in FP32 on one rank stays FP32
here: norms, biases and routers are whole on every rank, outside of FSDP, their gradients summed once a step; embeddings and head
are gathered as they are. Autocast itself stays on, for the activations. Gradients are summed in the parameters' own dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from openling.model.ling import Layer, Ling, SparseMoE
from openling.parallel.expert import shard_experts
from openling.parallel.mesh import Mesh
from openling.parallel.pipeline import Pipeline, cut
from openling.parallel.recompute import Recompute, recompute
from openling.parallel.table import Held, holdings, take_parts
from openling.parallel.tensor import split_over
from openling.plan.mesh import Gather
from openling.plan.table import is_apart

T = TypeVar("T")
EMBEDDINGS = "model.word_embeddings.weight"


def inside(model: Ling, compute: Callable[[], T]) -> T:
    """Call `compute`, which may use the model in any way, embedding and head included; backward may follow on its tensors.

    It returns tensors, bare or in tuples: FSDP looks for those that backward starts from.
    """
    if isinstance(model, FSDPModule):
        return model.run(compute)  # type: ignore[operator]
    return compute()


class Parallel:
    """A model on a mesh, and what a training loop asks of it. Without a mesh everything is local and the model plain."""

    def __init__(
        self,
        model: Ling,
        mesh: Mesh | None,
        parts: dict[str, Held],
        pipeline: Pipeline | None = None,
        gather: Gather = "accumulate",
    ) -> None:
        """parts: of all parameters of the whole model."""
        self.model, self.mesh, self.parts, self.pipeline, self.gather = model, mesh, parts, pipeline, gather
        self.tensor_group = None if mesh is None or mesh.axes.tensor == 1 else mesh.group("tensor")
        self.context_group = None if mesh is None or mesh.axes.context == 1 else mesh.group("context")

    def run(self, compute: Callable[[], T]) -> T:
        """`inside` of the model, which must be here as a whole."""
        assert self.pipeline is None, "a pipeline runs by Pipeline.step"
        return inside(self.model, compute)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks with other tokens: counts, losses, tokens per expert."""
        if self.mesh is None:
            return x
        out = x.clone()
        dist.all_reduce(out, group=self.mesh.group("data"))
        return out

    def last_of_step(self, last: bool) -> None:
        """Say before each backward whether it is the step's last: what earlier ones keep whole, and send not, `gather` says."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.gather == "layer")
            self.model.set_reshard_after_backward(last or self.gather != "step")

    def held(self, chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Parameters as this rank holds them: plain tensors in the same memory, which an optimiser steps without planning."""
        return {name: nn.Parameter(_local(p.detach())) if isinstance(p, DTensor) else p for name, p in chosen.items()}

    def clip(self, held: dict[str, nn.Parameter], limit: float) -> Tensor:
        """Complete the gradients and leave them in `held`, scaled to a norm of at most `limit`; returns the norm before."""
        if self.mesh is None:
            return nn.utils.clip_grad_norm_(list(held.values()), limit)
        if self.pipeline is not None:
            self.pipeline.add_shared()
        named = dict(self.model.named_parameters())
        for name, mine in held.items():
            if isinstance(p := named[name], DTensor) and p.grad is not None:
                mine.grad, p.grad = _local(p.grad), None
        gradients = {name: p.grad for name, p in held.items() if p.grad is not None}
        if self.tensor_group is not None:
            _add_up([g for name, g in gradients.items() if self.parts[name].partial], self.tensor_group)
        if self._data_ranks > 1:
            whole = [g for name, g in gradients.items() if not isinstance(named[name], DTensor)]
            _add_up(whole, self.mesh.group("data"))
        norm = self._norm(gradients, named)
        some = [g for g in gradients.values() if g.numel()]  # a rank may hold no row of a small matrix
        torch._foreach_mul_(some, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @property
    def _data_ranks(self) -> int:
        return 1 if self.mesh is None else self.mesh.axes.data_replicate * self.mesh.axes.shards

    def _norm(self, gradients: dict[str, Tensor], named: dict[str, nn.Parameter]) -> Tensor:
        """Of all ranks' parts, each counted once."""
        assert self.mesh is not None
        by_copies: dict[int, list[Tensor]] = {}
        for name, gradient in gradients.items():
            replicas = self.mesh.axes.data_replicate if isinstance(named[name], DTensor) else self._data_ranks
            ends = 2 if name == EMBEDDINGS and self.pipeline is not None and self.pipeline.shared is not None else 1
            if gradient.numel():
                by_copies.setdefault(replicas * self.parts[name].copies * ends, []).append(gradient)
        device = next(iter(named.values())).device
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients.values()) else torch.float32
        total = torch.zeros((), dtype=wide, device=device)
        for copies, some in by_copies.items():
            total += nn.utils.get_total_norm(some).to(wide).square() / copies
        dist.all_reduce(total)
        return total.sqrt()


def _add_up(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each over the group, all in one message."""
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, new in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(new.view_as(gradient))


def apply(
    model: Ling,
    mesh: Mesh | None,
    *,
    recomputing: Recompute = "none",
    compiled: bool = False,
    model_dtype: torch.dtype | None = None,
    gather: Gather = "accumulate",
    stages_per_rank: int = 1,
    seq_len: int = 4096,
) -> Parallel:
    """Put a whole model (on its device, or on "meta") onto the mesh, in place; what other stages hold leaves it.

    model_dtype: what the layers' matrices are cast to before they are gathered (see above); None keeps their own dtype.
    gather: how long they are kept, and gradients whole (`plan.setup.Setup`); a pipeline's stages go by "accumulate".
    stages_per_rank: of a pipeline; more than one are interleaved. seq_len: of rows, by which its layers are dealt.
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
    sharded = axes.data_replicate * axes.shards > 1
    if axes.pipeline == 1:
        if sharded:
            _shard(model, list(model.model.layers), mesh, model_dtype, keep=gather == "step")
            model.run = lambda compute: compute()  # type: ignore[assignment]
            register_fsdp_forward_method(model, "run")
        return Parallel(model, mesh, parts, gather=gather)
    stages = cut(model, mesh, per_rank=stages_per_rank, seq_len=seq_len)
    for stage in stages if sharded else ():
        _shard(stage, [*stage.layers, *stage.mtp], mesh, model_dtype)
    return Parallel(model, mesh, parts, Pipeline(model, stages, mesh))


def _shard(root: nn.Module, layers: list[nn.Module], mesh: Mesh, model_dtype: torch.dtype | None, *, keep: bool = False) -> None:
    """FSDP2: a group per layer, one for its experts where these are split already, and the rest in the root's.

    keep: layers' whole weights from forward to backward.
    """
    axes = mesh.axes
    dims = ("data_replicate", "shard") if axes.data_replicate > 1 else ("shard",)
    apart = {p for name, p in root.named_parameters() if is_apart(name, p.dim())}
    own = next(root.parameters()).dtype
    cast = MixedPrecisionPolicy(param_dtype=model_dtype, reduce_dtype=own if model_dtype else None, cast_forward_inputs=False)
    sharded: list[Any] = []
    for layer in layers:
        assert isinstance(layer, Layer)
        if axes.expert > 1 and isinstance(layer.mlp, SparseMoE):
            sharded.append(
                fully_shard(
                    layer.mlp.experts,
                    mesh=mesh.experts[dims],
                    mp_policy=cast,
                    ignored_params=apart,
                    reshard_after_forward=not keep,
                )
            )
        sharded.append(
            fully_shard(layer, mesh=mesh.dense[dims], mp_policy=cast, ignored_params=apart, reshard_after_forward=not keep)
        )
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    sharded.append(fully_shard(root, mesh=mesh.dense[dims], mp_policy=plain, ignored_params=apart))
    # A norm's output may be a view; nothing here changes one in place, which every forward would warn of. Only these classes are
    # silenced, and once: catching warnings at each step would make Python repeat all others at each step.
    names = "|".join(sorted({type(module).__name__ for module in sharded}))
    warnings.filterwarnings("ignore", message=rf"FSDP2-wrapped module \(({names})\) returned a view", category=UserWarning)
    for module in sharded:
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are shares of a mean over all ranks' tokens: gradients add up
        module.set_force_sum_reduction_for_comms(True)


def _sparse(model: Ling) -> list[SparseMoE]:
    return [m for m in model.modules() if isinstance(m, SparseMoE)]


def _compile(model: Ling, compiled: bool) -> None:
    if compiled:
        for layer in model.model.layers:
            layer.compile()


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
