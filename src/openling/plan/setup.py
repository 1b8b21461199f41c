"""One training job on a mesh: everything that memory, traffic and time depend on."""

from __future__ import annotations

from dataclasses import dataclass, field

from openling.errors import UserError
from openling.plan.activations import Cut, Policy, Rows
from openling.plan.devices import GIB, Device
from openling.plan.mesh import Gather, Mesh, Optimizer
from openling.plan.placement import Block, Inventory, Kind

EMBEDDINGS = ("model.word_embeddings.weight",)
HEAD = ("model.norm.weight", "lm_head.weight")


@dataclass(frozen=True)
class Followed:
    """A teacher: on the student's mesh, cut and spread alike, without a pipeline; forward only, layers gathered one by one.

    logits, align: what is followed: its logits, its hidden states behind every layer.
    """

    inventory: Inventory
    logits: bool = True
    align: bool = False

    def blocks(self, mesh: Mesh) -> list[Block]:
        """All that is loaded, MTP layers too: embeddings and head first."""
        return [*self.ends(mesh), *(self.inventory.layer_block(i, mesh) for i in range(self.inventory.layers))]

    def ends(self, mesh: Mesh) -> list[Block]:
        """Embeddings; final norm and head. They are gathered once and stay whole: no backward pass frees them (FSDP2's root)."""
        return [self.inventory.outer_block(names, mesh) for names in (EMBEDDINGS, HEAD)]

    def kinds(self) -> dict[Kind, tuple[int, int]]:
        """Of each kind of hidden layer: the first, and how many there are."""
        hidden = self.inventory.kinds[: self.inventory.config.num_hidden_layers]
        return {kind: (hidden.index(kind), hidden.count(kind)) for kind in dict.fromkeys(hidden)}


@dataclass(frozen=True)
class Setup:
    """A job. recompute: what activation checkpointing makes again in backward (`activations.Policy`).

    gather: "layer" frees a block's whole weights after each use and reduces gradients of every micro-batch; "accumulate" keeps
    whole gradients, in FP32, until a step's last micro-batch and reduces them once; "step" keeps whole weights through a step
    too. reserve: bytes that no part below accounts for (CUDA context, NCCL, fragmentation).
    """

    mesh: Mesh
    device: Device
    seq_len: int
    batch_tokens: int
    micro_batch: int = 1
    recompute: Policy = "layer"
    gather: Gather = "layer"
    optimizer: Optimizer = "adamw"
    reserve: int = 0
    teacher: Followed | None = field(default=None, compare=False)

    @property
    def micro_batches(self) -> int:
        """Per rank and step."""
        return self.batch_tokens // (self.seq_len * self.mesh.data * self.micro_batch)

    @property
    def shards(self) -> bool:
        """Whether FSDP is there: ranks with other tokens share or copy the weights."""
        return self.mesh.all_data > 1

    @property
    def accumulates(self) -> bool:
        """Whether gradients are whole through a step, in FP32. A step's only micro-batch reduces its own."""
        return self.shards and self.gather != "layer" and self.micro_batches > 1

    @property
    def rows(self) -> Rows:
        """A micro-batch on one rank, that with the longest slices."""
        return Rows(self.micro_batch, -(-self.seq_len // self.mesh.context))

    @property
    def cut(self) -> Cut:
        """How layers are split over ranks."""
        return Cut(self.mesh.tensor, self.mesh.context, self.mesh.expert)

    def check_batch(self) -> None:
        """UserError unless every rank gets whole micro-batches of whole sequences, and a pipeline one for each stage."""
        unit = self.seq_len * self.mesh.data * self.micro_batch
        if self.batch_tokens % unit == 0 and 0 < self.micro_batches < self.mesh.pipeline:
            raise UserError(
                "a step has fewer micro-batches than the pipeline has stages",
                where="--batch-tokens",
                value=f"{self.batch_tokens:,}: {self.micro_batches} micro-batches for {self.mesh.pipeline} stages",
                expected=f"at least {self.mesh.pipeline} micro-batches, or fewer stages",
                nearest=f"--batch-tokens {self.mesh.pipeline * unit}",
            )
        if self.batch_tokens % unit or not self.batch_tokens:
            whole = max(self.mesh.pipeline, round(self.batch_tokens / unit))
            raise UserError(
                "the batch does not divide over the ranks",
                where="--batch-tokens",
                value=f"{self.batch_tokens:,}",
                expected=f"a multiple of {unit:,} = {self.seq_len:,} tokens x {self.mesh.data:,} data ranks x {self.micro_batch}",
                nearest=f"--batch-tokens {whole * unit}",
            )


def default_reserve(device: Device) -> int:
    """1.5 GiB for CUDA context and NCCL, and 5 % of the memory for what the allocator cannot use: estimates."""
    return int(1.5 * GIB + 0.05 * device.memory)


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds: its layers and the blocks outside them."""

    index: int
    layers: list[int]
    blocks: dict[str, Block]
    last: bool
    kinds: dict[Kind, tuple[int, int]]  # of each kind of layer: the first, and how many there are
    like: int  # the first stage that holds the same: only its micro-batches in flight are more

    @property
    def ends(self) -> int:
        """Whole values of embeddings and head, as far as the stage has them."""
        return sum(b.gathered for name, b in self.blocks.items() if not name.startswith("layer"))


def stages(inv: Inventory, setup: Setup) -> list[Stage]:
    """All stages. The embeddings lie on the first, and again on the last if the head or an MTP layer reads them there."""
    key = (setup.mesh, setup.seq_len)
    if key not in inv.known_stages:
        inv.known_stages[key] = _stages(inv, *key)
    return inv.known_stages[key]


def _stages(inv: Inventory, mesh: Mesh, seq_len: int) -> list[Stage]:
    c = inv.config
    runs = inv.stages(mesh.pipeline, seq_len)
    found: list[Stage] = []
    first_with: dict[object, int] = {}
    for index, layers in enumerate(runs):
        last = index == mesh.pipeline - 1
        blocks = {}
        if index == 0 or (last and (c.num_nextn_predict_layers or c.tie_word_embeddings)):
            blocks["embeddings"] = inv.outer_block(EMBEDDINGS, mesh)
        blocks |= {f"layer {i}": inv.layer_block(i, mesh) for i in layers}
        if last:
            blocks["head"] = inv.outer_block(HEAD, mesh)
        kinds: dict[Kind, tuple[int, int]] = {}
        for i in layers:
            first, number = kinds.get(inv.kinds[i], (i, 0))
            kinds[inv.kinds[i]] = (first, number + 1)
        holds = (frozenset((kind, number) for kind, (_, number) in kinds.items()), "embeddings" in blocks, last)
        found.append(Stage(index, layers, blocks, last, kinds, first_with.setdefault(holds, index)))
    return found
