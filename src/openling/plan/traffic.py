"""What a rank sends per optimiser step, by collective and axis, in bytes, and how long the links need for it.

Bytes are those that one rank receives (and sends): (g - 1) / g of what a group of g gathers or scatters. Rates: NVLink inside a
node, the network between nodes, where a gathered buffer crosses through the network cards of all members of a node at once.
Latency of single calls is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from openling.model.config import ModelConfig
from openling.plan.activations import copies
from openling.plan.devices import Device
from openling.plan.mesh import Mesh
from openling.plan.placement import Block, Kind
from openling.plan.setup import Followed, Setup, Stage

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
When = Literal["hidden", "exposed", "once"]
HIDDEN: When = "hidden"
ONCE: When = "once"


@dataclass(frozen=True)
class Flow:
    """One kind of call: its axis, the bytes of one call on one rank, how often it runs per step, and its seconds in all.

    when: "hidden" behind the same block's compute as far as that lasts, "exposed" in the middle of a micro-batch, or "once" at
    the end of a step. `kind`: of the layers that make the call (all of a stage together), None outside them.
    """

    axis: str
    collective: Collective
    what: str
    bytes: float
    calls: int
    seconds: float
    when: When
    kind: Kind | None = None


def seconds(device: Device, mesh: Mesh, axis: str, collective: Collective, whole: float) -> float:
    """One call. whole: the gathered or scattered buffer; for all-to-all and send, what one rank sends."""
    size, stride = mesh.group(axis)
    if size == 1:
        return 0.0
    local = min(size, max(1, device.node // stride))
    nodes = size / local
    if collective == "send":
        return whole / (device.nvlink if stride < device.node and local > 1 else device.network)
    if collective == "all-to-all":
        inside = whole * (local - 1) / size / device.nvlink
        return max(inside, whole * (1 - local / size) / device.network)
    inside = whole * (size - 1) / size / device.nvlink if local > 1 else 0.0
    between = whole * (nodes - 1) / nodes / (local * device.network)
    return max(inside, between) * (2 if collective == "all-reduce" else 1)


def traffic(c: ModelConfig, setup: Setup, stage: Stage) -> list[Flow]:
    """Every flow of one rank of a stage."""
    makers = _Flows(setup)
    for name in ("embeddings", "head"):
        if name in stage.blocks:
            makers.weights(name, stage.blocks[name])
    for kind, (first, number) in stage.kinds.items():
        makers.kind, makers.number = kind, number
        makers.weights("layers", stage.blocks[f"layer {first}"])
        makers.layer(c, first)
    makers.kind, makers.number = None, 1
    makers.ends(c, stage)
    return [flow for flow in makers.found if flow.bytes]


def teacher_traffic(teacher: Followed, setup: Setup) -> list[Flow]:
    """Every flow of a teacher's forward passes."""
    makers, c, m = _Flows(setup, backward=False), teacher.inventory.config, setup.micro_batches
    for kind, (first, number) in teacher.kinds().items():
        makers.kind, makers.number = kind, number
        block = teacher.inventory.layer_block(first, setup.mesh)
        for axis, whole in (("fsdp", block.dense), ("expert_fsdp", block.experts)):
            makers.add(axis, "all-gather", "weights, BF16", 2 * whole, m, HIDDEN)
        makers.layer(c, first)
    makers.kind, makers.number = None, 1
    makers.add("tensor", "all-reduce", "embeddings, BF16", 2 * setup.rows.total * c.hidden_size, m, "exposed")
    return [replace(flow, what=f"teacher: {flow.what}") for flow in makers.found if flow.bytes]


class _Flows:
    """Collects the flows of a stage."""

    def __init__(self, setup: Setup, *, backward: bool = True) -> None:
        self.setup, self.mesh, self.found = setup, setup.mesh, list[Flow]()
        self.kind: Kind | None = None
        self.number = 1
        # Forward runs once more where backward makes a layer again: collectives are no matrix products, so "selective" too.
        self.forwards = 1 if setup.recompute == "none" or not backward else 2
        self.backwards = int(backward)

    @property
    def passes(self) -> int:
        """Through a layer, per micro-batch."""
        return self.forwards + self.backwards

    def add(self, axis: str, collective: Collective, what: str, whole: float, calls: int, when: When) -> None:
        """`calls` of each layer of the current kind."""
        size, _ = self.mesh.group(axis)
        if size == 1 or not whole or not calls:
            return
        received = whole if collective == "send" else whole * (size - 1) / size * (2 if collective == "all-reduce" else 1)
        one = seconds(self.setup.device, self.mesh, axis, collective, whole)
        name = {
            "fsdp": "shard x context" if self.mesh.context > 1 else "shard",
            "expert_fsdp": "shard of experts",
            "all_data": "data ranks",
        }.get(axis, axis)
        calls *= self.number
        self.found.append(Flow(name, collective, what, received, calls, one * calls, when, self.kind))

    def weights(self, name: str, one: Block) -> None:
        """Gathering weights and reducing gradients, of each layer or of the embeddings or head."""
        layers = name == "layers"
        value, dtype = (2, "BF16") if layers else (4, "FP32")
        gathers, gathered = self.gathers(layers=layers)
        reduces, reduced = (self.setup.micro_batches, HIDDEN) if self.setup.gather == "layer" else (1, ONCE)
        for axis, whole in (("fsdp", one.dense), ("expert_fsdp", one.experts)):
            what = "experts" if axis == "expert_fsdp" else name
            self.add(axis, "all-gather", f"weights of {what}, {dtype}", value * whole, gathers, gathered)
            self.add(axis, "reduce-scatter", f"gradients of {what}, FP32", 4 * whole, reduces, reduced)
        self.add("replicate", "all-reduce", "gradient shards, FP32", 4 * (one.local - one.apart), reduces, reduced)
        self.add("all_data", "all-reduce", "gradients of vectors and routers, FP32", 4 * one.apart, 1, ONCE)
        self.add("tensor", "all-reduce", "gradients of what tensor ranks hold alike, FP32", 4 * one.partial, 1, ONCE)

        if self.setup.optimizer == "muon":
            self.add("fsdp", "all-gather", "updates of matrices for Muon, BF16", 2 * one.shared_matrices, 1, ONCE)
            self.add("tensor", "all-gather", "updates of matrices for Muon, BF16", 2 * one.split_matrices, 1, ONCE)

    def gathers(self, *, layers: bool) -> tuple[int, When]:
        """How often a step gathers a block's weights: for forward and backward, but embeddings and head stay between them.

        A pipeline's schedule (torch.distributed.pipelining) keeps weights after backward. So a forward pass that follows one, or
        another backward pass, finds them: with one forward, one backward m + 1 gathers are left, and one of embeddings and head.
        """
        m, pipeline = self.setup.micro_batches, self.mesh.pipeline
        if self.setup.gather == "step" or (pipeline > 1 and not layers):
            return 1, ONCE
        if pipeline > 1:
            return m + 1, HIDDEN
        return (2 if layers else 1) * m, HIDDEN

    def layer(self, c: ModelConfig, layer: int) -> None:
        """Calls in the middle of a layer, of all micro-batches."""
        m, kind, rows, mesh = self.setup.micro_batches, c.layer_kind(layer), self.setup.rows, self.mesh
        hidden = 2 * rows.total * c.hidden_size
        # Outputs of mixer and feed-forward part, routed and shared experts apart; in backward the gradients of their inputs.
        halves = 3 if c.is_moe(layer) and c.num_shared_experts else 2
        self.add("tensor", "all-reduce", "outputs and gradients of inputs, BF16", hidden, halves * self.passes * m, "exposed")
        if c.is_moe(layer):
            # A row, and its weights (FP32) and experts (int64) on the way there.
            k = c.num_experts_per_tok
            whole = copies(c, mesh.expert) * (hidden + rows.total * k * 6)
            self.add("expert", "all-to-all", "rows to their experts and back, BF16", whole, 2 * self.passes * m, "exposed")
        if kind == "lightning":
            states = rows.sequences * c.num_attention_heads // mesh.tensor * c.head_dim**2 * 4
            self.add("context", "all-gather", "Lightning states, FP32", states * mesh.context, self.passes * m, "exposed")
        else:
            width = (c.kv_lora_rank or 0) + (c.qk_rope_head_dim or 0)
            width = width if kind == "mla" else 2 * c.num_key_value_heads * c.head_dim // mesh.tensor
            whole = 2 * rows.total * mesh.context * width
            what = "latents" if kind == "mla" else "keys and values"
            self.add("context", "all-gather", f"{what}, BF16", whole, self.forwards * m, "exposed")
            self.add("context", "reduce-scatter", f"gradients of {what}, BF16", whole, self.backwards * m, "exposed")

    def ends(self, c: ModelConfig, stage: Stage) -> None:
        """Between stages, and the vocabulary split over tensor ranks."""
        m, mesh = self.setup.micro_batches, self.mesh
        hidden = 2 * self.setup.rows.total * c.hidden_size
        neighbours = (stage.index > 0) + (not stage.last)
        self.add("pipeline", "send", "hidden states and their gradients, BF16", hidden, neighbours * m, "hidden")
        if stage.last:
            heads = 1 + c.num_nextn_predict_layers
            self.add("tensor", "all-reduce", "gradients of the LM head's input, BF16", hidden, heads * m, "exposed")
        if "embeddings" in stage.blocks:
            self.add("tensor", "all-reduce", "embeddings, BF16", hidden, m, "exposed")
            if mesh.pipeline > 1 and (c.num_nextn_predict_layers or c.tie_word_embeddings):
                size = 4 * stage.blocks["embeddings"].local
                self.add("pipeline", "send", "gradients of the embeddings on both ends, FP32", size, 1, "once")
