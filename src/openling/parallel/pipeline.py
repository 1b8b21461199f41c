"""Pipeline parallelism: the ranks of the mesh's outermost axis hold runs of layers and pass hidden states on.

    first stage                middle            last stage
    embeddings, layers    ->   layers    ->      layers, final norm, head, MTP layers, the loss; embeddings if it reads them

Layers are dealt so that stages cost alike (`plan.stages`). Every rank of a pipeline gets the same parts of a batch, so that ids,
documents and positions are known everywhere and only hidden states [tokens, M] and their gradients travel. A step is one call:
`torch.distributed.pipelining` runs all parts as micro-batches, one forward, one backward, or interleaved where a rank has several
stages. FSDP shards every stage for itself and reduces its gradients once, behind the last micro-batch.

Where the last stage reads embeddings (MTP layers, tied head) both ends hold them, and the two gradients are added before a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.tensor import DTensor

from openling.errors import UserError
from openling.model.cache import Memory
from openling.model.ling import CallContext, Ling
from openling.parallel.mesh import Mesh
from openling.plan.stages import stage_layers

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
Finish = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""From a micro-batch's number and the output of the final norm [B, T, M] to the loss, and terms [n] to be added up."""
Autocast = Callable[[], AbstractContextManager[object]]


class MicroBatch(Protocol):
    """What layers are called with."""

    @property
    def ids_BT(self) -> Tensor:  # noqa: N802
        """Local tokens."""

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Bounds of the documents of a packed row."""

    @property
    def memory(self) -> Memory | None:
        """Through which mixers see other ranks' slices of the rows."""


class Elsewhere(nn.Module):
    """Stands for a module that another rank has: names of what is here stay those of the whole model."""


def is_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer of the whole model lies on another rank of the pipeline."""
    module: Any = model
    for word in name.split("."):
        module = getattr(module, word, None)
        if isinstance(module, Elsewhere):
            return True
    return False


class Stage(nn.Module):
    """A run of layers and what stands before or behind them. It is called once for every micro-batch, in their order."""

    def __init__(self, model: Ling, layers: list[int], *, first: bool, last: bool) -> None:
        super().__init__()
        inner, hidden = model.model, model.config.num_hidden_layers
        self.first, self.last = first, last
        self.rope, self.embed = inner.rope, inner.embed
        self.layers = nn.ModuleList(inner.layers[i] for i in layers if i < hidden)
        self.mtp = nn.ModuleList(inner.layers[i] for i in layers if i >= hidden)
        if first or (last and reads_embeddings(model)):
            self.word_embeddings = inner.word_embeddings
        if last:
            self.norm, self.head = inner.norm, model.lm_head

    def begin(self, batches: Sequence[MicroBatch], finish: Finish, autocast: Autocast, dtype: torch.dtype) -> None:
        """What the coming calls are for, how the last stage ends, what forward runs in, and the residual stream's dtype."""
        self.coming, self.finish, self.autocast, self.dtype = iter(enumerate(batches)), finish, autocast, dtype
        self.terms: list[Tensor] = []

    def end(self) -> list[Tensor]:
        """Forget them; the terms of the last stage."""
        del self.coming, self.finish, self.autocast
        return self.terms

    def forward(self, h_NM: Tensor | None = None) -> Tensor:
        """From the hidden states [tokens, M] of the stage before to this one's; from the last stage the loss."""
        number, batch = next(self.coming)
        ids, memory = batch.ids_BT, batch.memory
        with self.autocast():
            h = self.embed(ids) if h_NM is None else h_NM.view(*ids.shape, -1)
            tables = self.rope(ids, 0, batch.cu_seqlens) if memory is None else self.rope.at(memory.positions(ids, None))
            call = CallContext(tables, batch.cu_seqlens, None)
            for layer in self.layers:
                h = layer(h, call, None if memory is None else memory.layers[0])
            if not self.last:
                return h.flatten(0, 1).to(self.dtype)
            loss, terms = self.finish(number, self.norm(h))
        self.terms.append(terms)
        return loss.to(loss_dtype(self.dtype))


def reads_embeddings(model: Ling) -> bool:
    """Whether the last stage needs the embeddings too."""
    return model.config.num_nextn_predict_layers > 0 or model.config.tie_word_embeddings


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of losses of a residual stream of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_runs(layers: int, ranks: int, per_rank: int) -> None:
    """A `UserError` where layers cannot be dealt to so many stages."""
    if not ranks <= ranks * per_rank <= layers:
        raise UserError(
            "every stage has a layer, and every rank a stage",
            where="stages_per_rank",
            value=per_rank,
            expected=f"1 to {layers // ranks} ({layers} layers over pipeline = {ranks} ranks)",
        )


def check_count(parts: int, ranks: int, per_rank: int) -> None:
    """A `UserError` where the schedule cannot take so many parts of a step."""
    rounds = max(1, parts // ranks)
    if per_rank == 1 and parts < ranks:
        raise UserError(
            "a step has fewer parts than the pipeline has stages",
            where="pipeline",
            value=ranks,
            expected=f"at most {parts}, or smaller parts of the batch",
        )
    if per_rank > 1 and parts % rounds:
        raise UserError(
            "interleaved stages take a step's parts in rounds of one size",
            where="stages_per_rank",
            value=f"{parts} parts on {ranks} ranks",
            expected=f"a multiple of {rounds} parts, or one stage per rank",
        )


def cut(model: Ling, mesh: Mesh, *, per_rank: int, seq_len: int) -> list[Stage]:
    """This rank's stages, in order; everything else leaves the model.

    Stage s lies on pipeline rank s mod P, so the loss is on the last rank. seq_len: of the rows, for the layers' costs.
    """
    ranks, rank, layers = mesh.axes.pipeline, mesh.rank("pipeline"), model.config.num_hidden_layers
    count = ranks * per_rank
    check_runs(layers, ranks, per_rank)
    runs = stage_layers(model.config, count, seq_len)
    stages = [Stage(model, runs[s], first=s == 0, last=s == count - 1) for s in range(rank, count, ranks)]
    here = {module for stage in stages for module in stage.modules()}
    inner = model.model
    for i, layer in enumerate(inner.layers):
        if layer not in here:
            inner.layers[i] = Elsewhere()
    for owner, name in ((inner, "word_embeddings"), (inner, "norm"), (model, "lm_head")):
        if getattr(owner, name) not in here:
            setattr(owner, name, Elsewhere())
    return stages


class Pipeline:
    """This rank's stages and the schedule that runs them."""

    def __init__(self, model: Ling, stages: list[Stage], mesh: Mesh) -> None:
        self.stages, self.width, self.dtype = stages, model.config.hidden_size, next(model.parameters()).dtype
        self.ranks, self.rank, self.group = mesh.axes.pipeline, mesh.rank("pipeline"), mesh.group("pipeline")
        self.device_type = mesh.device_type
        self.device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
        held_twice = reads_embeddings(model) and self.rank in (0, self.ranks - 1)
        self._embeddings: nn.Module | None = model.model.word_embeddings if held_twice else None
        self._known: tuple[tuple[Any, ...], Schedule] | None = None

    def step(self, batches: Sequence[MicroBatch], finish: Finish, terms: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of all of a step's micro-batches; sums of losses and of terms [terms], detached, on every rank.

        Autocast that is on here is on in forward passes alone. A `UserError` where the schedule cannot take so many, or where
        they differ in their number of tokens.
        """
        dtype = self._stream_dtype()
        schedule = self._schedule(len(batches), self._tokens(batches), dtype)
        losses: list[Tensor] = []
        with outside_autocast(self.device_type) as autocast:
            for stage in self.stages:
                stage.begin(batches, finish, autocast, dtype)
            # The schedule wants a target for every micro-batch; `finish` has its own.
            schedule.step(target=torch.arange(len(batches)), losses=losses, return_outputs=False)
        found = [stage.end() for stage in self.stages][-1]
        out = torch.zeros(1 + terms, dtype=loss_dtype(dtype), device=self.device)
        if losses:
            out[0] = torch.stack(losses).sum().detach()
            out[1:] = torch.stack(found).sum(0)
        dist.broadcast(out, dist.get_global_rank(self.group, self.ranks - 1), group=self.group)
        return out[0], out[1:]

    @property
    def shared(self) -> nn.Parameter | None:
        """The embeddings, where both ends of the pipeline hold them and this is one."""
        return None if self._embeddings is None else next(self._embeddings.parameters())

    def add_shared(self) -> None:
        """Give both ends the sum of the embeddings' gradients, the same bits."""
        p = self.shared
        if p is None or not p.requires_grad:
            return
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        mine = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        if not mine.numel():  # fewer words than shards: the other end has none of them either
            return
        peer = dist.get_global_rank(self.group, self.ranks - 1 - self.rank)
        given, taken = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        both = [dist.P2POp(dist.isend, given, peer, self.group), dist.P2POp(dist.irecv, taken, peer, self.group)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        mine += taken

    def _tokens(self, batches: Sequence[MicroBatch]) -> int:
        """Local tokens of a micro-batch."""
        check_count(len(batches), self.ranks, len(self.stages))
        sizes = sorted({batch.ids_BT.numel() for batch in batches})
        if len(sizes) > 1:
            raise UserError(
                "the parts of a pipeline's step differ in size", where="pipeline", value=sizes, expected="equally many tokens"
            )
        return sizes[0]

    def _stream_dtype(self) -> torch.dtype:
        """Of what `Backbone.embed` returns under the present autocast."""
        halved = self.device_type == "cuda" and torch.is_autocast_enabled("cuda")
        return torch.get_autocast_dtype("cuda") if halved else self.dtype

    def _schedule(self, *shape: Any) -> Schedule:
        """The schedule of that shape; kept while steps are alike, since a stage has buffers for every micro-batch."""
        if self._known is None or self._known[0] != shape:
            self._known = None
            self._known = shape, self._new_schedule(*shape)
        return self._known[1]

    def _new_schedule(self, number: int, tokens: int, dtype: torch.dtype) -> Schedule:
        stages: list[Any] = []
        # Shapes are told, not tried out: a trial would run collectives and count tokens of experts.
        hidden = torch.empty(tokens, self.width, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=loss_dtype(dtype), device="meta", requires_grad=True)
        for k, stage in enumerate(self.stages):
            place, count = self.rank + k * self.ranks, self.ranks * len(self.stages)
            given, made = () if stage.first else (hidden,), (loss if stage.last else hidden,)
            stages.append(PipelineStage(stage, place, count, self.device, given, made, group=self.group))
        # Losses are shares of the step's mean: gradients add up.
        if len(stages) == 1:
            return Schedule1F1B(stages[0], number, _loss, scale_grads=False)
        return ScheduleInterleaved1F1B(stages, number, _loss, scale_grads=False)


def _loss(loss: Tensor, target: Tensor) -> Tensor:
    return loss


@contextmanager
def outside_autocast(device_type: str) -> Iterator[Autocast]:
    """Turn autocast off; gives what turns it on again as it was. Backward must run outside."""
    on, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        yield lambda: torch.autocast(device_type, dtype, enabled=on)
