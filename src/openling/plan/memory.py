"""Bytes on the fullest rank of every pipeline stage, by kind.

Exact: parameters, gradients, optimiser states (shapes of the real model) and what autograd keeps (`activations`). Derived from
how FSDP2 and torch.distributed.pipelining work: gathered blocks, whole gradients, buffers of a pipeline's stages. Estimates:
temporaries of a layer's backward pass, other communication buffers, reserve.
"""

from __future__ import annotations

from dataclasses import dataclass

from openling.model.config import ModelConfig
from openling.plan.activations import Saved, copies, expert_rows, layer_bytes, layer_saved, outer_saved
from openling.plan.placement import Inventory
from openling.plan.setup import Setup, Stage, stages

# Values of one chunk of logits: `ops.loss.KERNEL_CHUNK_VALUES`, which cannot be imported without torch.
LOSS_CHUNK = 2**30
KINDS = (
    "parameters", "gradients", "optimiser", "gathered weights", "activations", "logits and loss", "teacher", "communication",
    "reserve",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Some bytes on a rank: their kind, and what they are."""

    kind: str
    what: str
    bytes: int


@dataclass(frozen=True)
class StageMemory:
    """All parts on one rank of a stage."""

    stage: int
    parts: list[Part]

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(p.bytes for p in self.parts)

    def by_kind(self) -> dict[str, int]:
        """Bytes of every kind, in the order of KINDS."""
        return {kind: sum(p.bytes for p in self.parts if p.kind == kind) for kind in KINDS}


@dataclass(frozen=True)
class LayerCost:
    """What one layer keeps of a micro-batch, what exists besides while its backward pass runs, and its temporaries."""

    kept: int
    recomputed: int
    passing: int


class LayerCosts:
    """Bytes of layers by kind; computed once for all layers alike and for all meshes that cut them alike."""

    def __init__(self, inv: Inventory) -> None:
        self.inv = inv
        self._known: dict[object, LayerCost] = {}

    def of(self, layer: int, setup: Setup) -> LayerCost:
        """Of a layer on this mesh."""
        key = (self.inv.kinds[layer], setup.rows, setup.cut, setup.recompute)
        if key not in self._known:
            c = self.inv.config
            saved = layer_saved(c, layer, setup.rows, cut=setup.cut)
            found = layer_bytes(c, layer, setup.rows, setup.recompute, cut=setup.cut)
            self._known[key] = LayerCost(found.kept, found.recomputed, transient(c, layer, setup, saved))
        return self._known[key]


def memory(inv: Inventory, setup: Setup, costs: LayerCosts | None = None) -> list[StageMemory]:
    """Every stage's fullest rank."""
    costs = costs or LayerCosts(inv)
    return [StageMemory(stage.index, _stage(inv.config, setup, stage, costs)) for stage in stages(inv, setup)]


def fullest(inv: Inventory, setup: Setup, costs: LayerCosts) -> int:
    """Bytes of the fullest rank of all stages: of those that hold the same, the first."""
    found = [stage for stage in stages(inv, setup) if stage.like == stage.index]
    return max(sum(p.bytes for p in _stage(inv.config, setup, stage, costs)) for stage in found)


def _stage(c: ModelConfig, setup: Setup, stage: Stage, costs: LayerCosts) -> list[Part]:
    """What is there all the time, and what comes to it at the fullest moment of a step."""
    always = _states(setup, stage) + _teacher_states(setup) + _communication(c, setup, stage)
    always.append(Part("reserve", "CUDA context, NCCL, fragmentation (estimate)", setup.reserve))
    fullest_moment = max(_moments(c, setup, stage, costs), key=lambda parts: sum(p.bytes for p in parts))
    return [p for p in always + fullest_moment if p.bytes]


def _states(setup: Setup, stage: Stage) -> list[Part]:
    """Weights and optimiser states: this rank's shards, and vectors and routers in whole."""
    blocks = list(stage.blocks.values())
    local, buffers, apart = (sum(getattr(b, what) for b in blocks) for what in ("local", "buffers", "apart"))
    parts = [
        Part("parameters", "master weights of matrices, FP32, sharded", 4 * (local - apart)),
        Part("parameters", "vectors and routers, FP32, on every rank", 4 * apart),
        Part("parameters", "router bias, FP32, on every rank", 4 * buffers),
    ]
    matrices, tensors = 0, sum(b.tensors for b in blocks)
    if setup.optimizer == "muon":
        matrices = sum(b.matrices for b in blocks)
        tensors -= sum(b.matrix_tensors for b in blocks)
        parts.append(Part("optimiser", "Muon: momentum of matrices, FP32", 4 * matrices))
    parts.append(Part("optimiser", "AdamW: exp_avg, FP32", 4 * (local - matrices)))
    parts.append(Part("optimiser", "AdamW: exp_avg_sq, FP32", 4 * (local - matrices)))
    parts.append(Part("optimiser", "AdamW: step numbers, FP32", 4 * tensors))
    return parts


def _moments(c: ModelConfig, setup: Setup, stage: Stage, costs: LayerCosts) -> list[list[Part]]:
    """When a step may be fullest: in the loss, in the first layer that goes backward, in the last.

    The gradients of a step's only micro-batch come into being from the first of these to the last; those of several are there
    from the second on. Where they are kept whole, the last micro-batch reduces them; a pipeline does so behind it.
    """
    layers = [costs.of(first, setup) for first, _ in stage.kinds.values()]
    several, pipeline = setup.micro_batches > 1, setup.mesh.pipeline > 1
    whole, sharded = _gradients(setup, stage)
    before = [whole if setup.accumulates else sharded] if several else []
    kept, loss = _kept(c, setup, stage, costs), _loss(c, setup) if stage.last else []
    passing = [
        Part("activations", "one layer, recomputed", max(layer.recomputed for layer in layers)),
        Part("activations", "temporaries of one layer's backward pass (estimate)", max(layer.passing for layer in layers)),
    ]
    made, reduced, shard = _block_gradients(stage)
    first = [*before, kept, *_loss_left(c, setup, stage), *passing, *_gathered(setup, stage), made]
    if not pipeline:
        first += [reduced, *([shard] if setup.accumulates else [])]
    in_loss = [*before, kept, *loss, *_teacher_in_loss(setup), *_gathered(setup, stage, in_forward=True)]
    left = Part("activations", "kept, of the first layer and of other micro-batches", _left(setup, stage, costs))
    last = [left, *passing, *_gathered(setup, stage, last=True), made]
    found = [first, in_loss]
    if setup.accumulates:
        found.append([whole, *last])
    if pipeline and setup.accumulates:
        return [*found, [whole, reduced, *_gathered(setup, stage, last=True)]]
    ends = Part("gradients", "of embeddings and head, FP32, whole", 4 * stage.ends if setup.shards else 0)
    return [*found, [sharded, ends, *last, reduced]]


def _teacher_states(setup: Setup) -> list[Part]:
    """A teacher's weights."""
    if (teacher := setup.teacher) is None:
        return []
    mesh = setup.mesh
    whole = sum(b.gathered for b in teacher.ends(mesh)) if setup.shards else 0
    return [
        Part("teacher", "weights, FP32, sharded as the student's", 4 * sum(b.local + b.buffers for b in teacher.blocks(mesh))),
        Part("teacher", "embeddings and head, FP32, whole from the first step on", 4 * whole),
    ]


def _teacher_in_loss(setup: Setup) -> list[Part]:
    """What the loss has of a teacher: its hidden states (to be aligned with, those behind every layer), head and logits."""
    if (teacher := setup.teacher) is None:
        return []
    c, tokens = teacher.inventory.config, setup.rows.total
    vocabulary, streams = -(-c.vocab_size // setup.mesh.tensor), c.num_hidden_layers + 1 if teacher.align else 1
    return [
        Part("teacher", "hidden states, BF16", 2 * tokens * c.hidden_size * streams),
        Part("teacher", "the LM head in BF16", 2 * vocabulary * c.hidden_size),
        Part("teacher", "a chunk of logits, BF16", 2 * min(LOSS_CHUNK, tokens * vocabulary) * teacher.logits),
    ]


def _gradients(setup: Setup, stage: Stage) -> tuple[Part, Part]:
    """Before and after they are reduced."""
    blocks = stage.blocks.values()
    whole = Part("gradients", "FP32, whole until the step's last micro-batch", 4 * sum(b.whole for b in blocks))
    return whole, Part("gradients", "FP32, sharded", 4 * sum(b.local for b in blocks))


def _gathered(setup: Setup, stage: Stage, *, in_forward: bool = False, last: bool = False) -> list[Part]:
    """Whole weights: layers' in BF16, and those of embeddings and head, which are one block, in FP32.

    A pipeline's schedule keeps what backward gathers up to the next forward pass. Where no ranks share weights nothing is
    gathered, but autocast keeps its casts of all weights to the end of forward (of a pipeline's step), and autograd those of
    layers that are not recomputed until their own backward pass.
    """
    sizes = [b.gathered for name, b in stage.blocks.items() if name.startswith("layer")]
    pair = max((a + b for a, b in zip(sizes, sizes[1:], strict=False)), default=sizes[0])
    weights = Part("gathered weights", "BF16, the layer at work and the next", 2 * pair)
    if not setup.shards:
        if in_forward or setup.mesh.pipeline > 1 or (setup.recompute != "layer" and not last):
            weights = Part("gathered weights", "BF16, casts of all layers", 2 * sum(sizes))
        return [weights]
    if setup.gather == "step" or (setup.mesh.pipeline > 1 and last):
        weights = Part("gathered weights", "BF16, all layers of the stage", 2 * sum(sizes))
    return [weights, Part("gathered weights", "FP32, embeddings and head", 4 * stage.ends)]


def _block_gradients(stage: Stage) -> tuple[Part, Part, Part]:
    """Of the block at work: as backward makes them, a copy from which they are reduced, and the shard that comes of it."""
    layer = max((b for name, b in stage.blocks.items() if name.startswith("layer")), key=lambda b: b.gathered)
    copy = 4 * max(stage.ends, layer.gathered)
    return (
        Part("gathered weights", "gradients of the layer at work, BF16", 2 * layer.gathered),
        Part("gathered weights", "gradients of the block at work in FP32 while they are reduced", copy),
        Part("gradients", "FP32, sharded, of the layer at work", 4 * layer.local),
    )


def in_flight(setup: Setup, stage: Stage) -> int:
    """Micro-batches whose activations a stage holds at once: one forward, one backward."""
    return min(setup.micro_batches, setup.mesh.pipeline - stage.index)


def _kept(c: ModelConfig, setup: Setup, stage: Stage, costs: LayerCosts) -> Part:
    """What all layers keep from forward to backward."""
    count = in_flight(setup, stage)
    held = sum(costs.of(first, setup).kept * number for first, number in stage.kinds.values())
    outer = sum(s.bytes for s in outer_saved(c, setup.rows)) if stage.last else 0
    times = f", {count} micro-batches in flight" if count > 1 else ""
    return Part("activations", f"kept, recompute {setup.recompute}{times}", count * held + outer)


def _left(setup: Setup, stage: Stage, costs: LayerCosts) -> int:
    """Bytes kept when a micro-batch's backward pass reaches the stage's first layer."""
    layers = [(costs.of(first, setup).kept, number) for first, number in stage.kinds.values()]
    others = (in_flight(setup, stage) - 1) * sum(kept * number for kept, number in layers)
    return others + min(kept for kept, _ in layers)


def transient(c: ModelConfig, layer: int, setup: Setup, saved: list[Saved]) -> int:
    """Two gradients of the largest kept tensor; for experts also their outputs, one row each, and the gradients of h."""
    largest = 2 * max(s.bytes for s in saved)
    if not c.is_moe(layer):
        return largest
    padded = expert_rows(setup.rows.total * c.num_experts_per_tok, c.num_experts // setup.mesh.expert)
    return max(largest, padded * (c.hidden_size + 3 * c.moe_intermediate_size // setup.mesh.tensor) * 2)


def _loss(c: ModelConfig, setup: Setup) -> list[Part]:
    """`ops.loss`: a chunk of logits at a time, the gradients of both inputs formed in the same pass and kept for backward."""
    tokens, vocabulary = setup.rows.total, -(-c.vocab_size // setup.mesh.tensor)
    head, heads = vocabulary * c.hidden_size, 1 + c.num_nextn_predict_layers
    return [
        Part("logits and loss", "a chunk of logits, BF16", 2 * min(LOSS_CHUNK, tokens * vocabulary)),
        Part("logits and loss", "the LM head in BF16", 2 * head),
        Part(
            "logits and loss",
            "gradients of LM head, FP32, and hidden states, BF16, by head",
            heads * (4 * head + 2 * tokens * c.hidden_size),
        ),
    ]


def _loss_left(c: ModelConfig, setup: Setup, stage: Stage) -> list[Part]:
    """What the loss leaves to the first layer that goes backward. Of the head's gradients one is added up already."""
    head, heads = -(-c.vocab_size // setup.mesh.tensor) * c.hidden_size, 1 + c.num_nextn_predict_layers
    hidden, left = 2 * setup.rows.total * c.hidden_size, heads - (setup.micro_batches > 1)
    what = "gradients of LM head, FP32, and hidden states, BF16, by head"
    return [Part("logits and loss", what, 4 * head * left + hidden * heads)] if stage.last else []


def _communication(c: ModelConfig, setup: Setup, stage: Stage) -> list[Part]:
    """Buffers of what is in transit.

    torch.distributed.pipelining has a buffer for every micro-batch of a step on each side that a stage receives from, hidden
    states from the stage before and gradients from the next (`PipelineStage._setup_forward_recv_info`, `_create_grad_recv_info`
    of torch 2.11 and 2.13), and keeps what a stage has sent until its backward pass.
    """
    mesh, rows = setup.mesh, setup.rows
    hidden = 2 * rows.total * c.hidden_size
    parts = []
    if mesh.expert > 1 and any(c.is_moe(i) for i in stage.layers):
        # Sent, received, and added up in FP32.
        size = int(4 * hidden * copies(c, mesh.expert))
        parts.append(Part("communication", "rows to and from other experts (estimate)", size))
    if mesh.context > 1:
        states = c.num_attention_heads // mesh.tensor * c.head_dim**2 * 4 * rows.sequences
        parts.append(Part("communication", "Lightning states of all context ranks, FP32", 2 * mesh.context * states))
    if mesh.pipeline > 1:
        sides = (stage.index > 0) + (not stage.last)
        size = sides * setup.micro_batches * hidden
        parts.append(Part("communication", "buffers of all micro-batches from neighbour stages, BF16", size))
        size = hidden * (in_flight(setup, stage) * (not stage.last) + (stage.index > 0))
        parts.append(Part("communication", "hidden states and gradients to neighbour stages, BF16", size))
    return parts
