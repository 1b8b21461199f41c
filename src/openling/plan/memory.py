"""Bytes on the fullest rank of every pipeline stage, by kind.

Exact: parameters, gradients, optimiser states (shapes of the real model) and what autograd keeps (`activations`). Derived from
how FSDP2 works: gathered blocks. Estimates: temporaries of a layer's backward pass, communication buffers, reserve.
"""

from __future__ import annotations

from dataclasses import dataclass

from openling.model.config import ModelConfig
from openling.plan.activations import Saved, copies, expert_rows, layer_bytes, layer_saved, outer_saved
from openling.plan.placement import Inventory
from openling.plan.setup import Setup, Stage, stages

# Values of one chunk of logits: `ops.loss.KERNEL_CHUNK_VALUES`, which cannot be imported without torch.
LOSS_CHUNK = 2**30
KINDS = ("parameters", "gradients", "optimiser", "gathered weights", "activations", "logits and loss", "communication", "reserve")


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
    always = _states(setup, stage) + _communication(c, setup, stage)
    always.append(Part("reserve", "CUDA context, NCCL, fragmentation (estimate)", setup.reserve))
    fullest_moment = max(_moments(c, setup, stage, costs), key=lambda parts: sum(p.bytes for p in parts))
    return [p for p in always + fullest_moment if p.bytes]


def _states(setup: Setup, stage: Stage) -> list[Part]:
    """Weights and optimiser states, sharded over all ranks that share them; what gradients are whole through a step."""
    blocks = list(stage.blocks.values())
    local, buffers = sum(b.local for b in blocks), sum(b.buffers for b in blocks)
    parts = [
        Part("parameters", "master weights, FP32, sharded", 4 * local),
        Part("parameters", "router bias, FP32, on every rank", 4 * buffers),
    ]
    if setup.gather != "layer":
        parts.append(Part("gradients", "FP32, whole until the step's last micro-batch", 4 * sum(b.whole for b in blocks)))
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
    from the second on.
    """
    layers = [costs.of(first, setup) for first, _ in stage.kinds.values()]
    several = setup.micro_batches > 1
    gradients = Part("gradients", "FP32, sharded", 4 * sum(b.local for b in stage.blocks.values()))
    kept, loss = _kept(c, setup, stage, costs), _loss(c, setup) if stage.last else []
    passing = [
        Part("activations", "one layer, recomputed", max(layer.recomputed for layer in layers)),
        Part("activations", "temporaries of one layer's backward pass (estimate)", max(layer.passing for layer in layers)),
    ]
    at_work = _gathered(setup, stage)
    first = [*([gradients] if several else []), kept, *loss[-1:], *passing, *at_work, *_block_gradients(stage)]
    one = min(layer.kept for layer in layers)
    left = Part("activations", "kept, of the first layer", one if in_flight(setup, stage) == 1 else kept.bytes)
    last = [gradients, left, *passing, *_gathered(setup, stage, last=True), *_block_gradients(stage)]
    in_loss = [*([gradients] if several else []), kept, *loss, *_gathered(setup, stage, in_forward=True)]
    return [first, last, in_loss]


def _gathered(setup: Setup, stage: Stage, *, in_forward: bool = False, last: bool = False) -> list[Part]:
    """Whole BF16 weights of the blocks at work. Embeddings, final norm and head are one block that stays.

    One rank gathers nothing, but autocast keeps its casts of all weights to the end of forward, and autograd those of layers
    that are not recomputed until their own backward pass.
    """
    ends = sum(b.whole for name, b in stage.blocks.items() if not name.startswith("layer"))
    sizes = [b.whole for name, b in stage.blocks.items() if name.startswith("layer")]
    pair = max((a + b for a, b in zip(sizes, sizes[1:], strict=False)), default=sizes[0])
    weights = Part("gathered weights", "BF16, the layer at work and the next", 2 * pair)
    if setup.mesh.world == 1 and (in_forward or (setup.recompute != "layer" and not last)):
        weights = Part("gathered weights", "BF16, casts of all layers", 2 * sum(sizes))
    elif setup.gather == "step":
        weights = Part("gathered weights", "BF16, all layers of the stage", 2 * sum(sizes))
    return [weights, Part("gathered weights", "BF16, embeddings and head", 2 * ends)]


def _block_gradients(stage: Stage) -> list[Part]:
    ends = sum(b.whole for name, b in stage.blocks.items() if not name.startswith("layer"))
    largest = max(ends, *(b.whole for name, b in stage.blocks.items() if name.startswith("layer")))
    return [
        Part("gathered weights", "gradients of the block at work, BF16", 2 * largest),
        Part("gathered weights", "the same in FP32 while they are reduced", 4 * largest),
    ]


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


def transient(c: ModelConfig, layer: int, setup: Setup, saved: list[Saved]) -> int:
    """Two gradients of the largest kept tensor; for experts also their outputs, one row each, and the gradients of h."""
    largest = 2 * max(s.bytes for s in saved)
    if not c.is_moe(layer):
        return largest
    padded = expert_rows(setup.rows.total * c.num_experts_per_tok, c.num_experts // setup.mesh.expert)
    return max(largest, padded * (c.hidden_size + 3 * c.moe_intermediate_size // setup.mesh.tensor) * 2)


def _loss(c: ModelConfig, setup: Setup) -> list[Part]:
    """`ops.loss.head_loss`: a chunk of logits at a time, the gradients of both inputs formed in the same pass."""
    tokens, vocabulary = setup.rows.total, -(-c.vocab_size // setup.mesh.tensor)
    head, heads = vocabulary * c.hidden_size, 1 + c.num_nextn_predict_layers
    return [
        Part("logits and loss", "a chunk of logits, BF16", 2 * min(LOSS_CHUNK, tokens * vocabulary)),
        Part("logits and loss", "gradient of the LM head while it is summed, FP32", 4 * head),
        Part(
            "logits and loss",
            "gradients of LM head and hidden states, BF16, by head",
            2 * heads * (head + tokens * c.hidden_size),
        ),
    ]


def _communication(c: ModelConfig, setup: Setup, stage: Stage) -> list[Part]:
    """Buffers of what is in transit (estimate)."""
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
        parts.append(Part("communication", "hidden states to and from neighbour stages, BF16", 4 * hidden))
    return parts
