"""What a walk through the layers reads: a model in memory, or a folder of any size from which one layer at a time is held.

The walk, the fits and the student are the same for both (`calibrate.py`, `convert.py`); only the source of layers differs.
Legend: B windows of a batch, T tokens, M hidden size, N tokens, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from openling.model.config import ModelConfig
from openling.model.ling import Layer, Ling, MtpLayer, Rope, RopeTables
from openling.ops.moe import combine_experts
from openling.ops.norm import rms_norm
from openling.weights.folder import EMBEDDINGS, Opened, finite, read_binding


class Stack(Protocol):
    """A model as its layers, in order: hidden ones, then MTP."""

    config: ModelConfig

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings, [B, T, M]."""

    def rope(self, ids_BT: Tensor) -> RopeTables:
        """Rotation tables for windows of this length."""

    def layer(self, index: int) -> Layer:
        """A layer; the same object until another one is asked for."""

    def norm(self, h_BTM: Tensor) -> Tensor:
        """The final norm."""


class ModelStack:
    """A whole model in memory."""

    def __init__(self, model: Ling) -> None:
        self.model = model
        self.config = model.config

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings, [B, T, M]."""
        return self.model.model.word_embeddings(ids_BT)

    def rope(self, ids_BT: Tensor) -> RopeTables:
        """Rotation tables for windows of this length."""
        return self.model.model.rope(ids_BT, 0, None)

    def layer(self, index: int) -> Layer:
        """A layer of the model."""
        return self.model.model.layer(index)

    def norm(self, h_BTM: Tensor) -> Tensor:
        """The final norm."""
        return self.model.model.norm(h_BTM)


def stack_of(model: Ling | Stack) -> Stack:
    """A model in memory as its layers; a stack is one already."""
    return ModelStack(model) if isinstance(model, Ling) else model


class FolderStack:
    """A checkpoint folder, one layer in memory at a time, as FP32; on a CPU its routed experts one by one, as they are used.

    `mixers_only`: layers without their feed-forward part (it stays on the meta device), for fits that pass nothing on.
    """

    def __init__(self, opened: Opened, device: torch.device, *, mixers_only: bool = False) -> None:
        self.opened, self.config, self.device, self.mixers_only = opened, opened.config, device, mixers_only
        self._rope = Rope(opened.config)
        self._held: tuple[int, Layer] | None = None

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings, [B, T, M]; only the rows of these tokens are read."""
        binding, reader = self.opened.bindings[EMBEDDINGS], self.opened.reader
        rows, place = ids_BT.cpu().unique(return_inverse=True)
        # FP32 before they are joined: MTP layers embed in autocast, whose cat on a CPU refuses FP16.
        found = torch.cat([reader.read_rows(binding.theirs[0], int(row), 1).to(self.opened.stored).float() for row in rows])
        finite(found, f"{binding.theirs[0]} in {self.opened.folder}")
        return found.to(self.device)[place.to(self.device)]

    def rope(self, ids_BT: Tensor) -> RopeTables:
        """Rotation tables for windows of this length."""
        return self._rope(ids_BT, 0, None)

    def layer(self, index: int) -> Layer:
        """A layer, read from the folder unless it was the last one asked for."""
        if self._held is None or self._held[0] != index:
            self._held = None
            self._held = index, self._read(index)
        return self._held[1]

    def norm(self, h_BTM: Tensor) -> Tensor:
        """The final norm."""
        weight = self._tensor("model.norm.weight", torch.Size((self.config.hidden_size,)))
        return rms_norm(h_BTM, weight, self.config.rms_norm_eps)

    def _read(self, index: int) -> Layer:
        with torch.device("meta"):
            layer = empty_layer(self.config, index)
        prefix = f"model.layers.{index}."
        shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
        if self.mixers_only:
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(("attention.", "input_layernorm."))}
        elif self.device.type == "cpu" and self.config.is_moe(index):
            layer.mlp.experts = DiskExperts(self, prefix + "mlp.experts.")
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith("mlp.experts.")}
        state = {name: self._tensor(prefix + name, shape) for name, shape in shapes.items()}
        layer.load_state_dict(state, assign=True, strict=not self.mixers_only)
        return layer.eval()

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        return read_binding(self.opened, name, shape, self.device).float()

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert's matrix of a stack, FP32."""
        opened = self.opened
        piece = opened.bindings[name].theirs[expert]
        return finite(opened.reader.read(piece), f"{piece} in {opened.folder}").to(opened.stored).float()


class DiskExperts(nn.Module):
    """`Experts` whose matrices are read when their expert has tokens, and dropped after it."""

    def __init__(self, stack: FolderStack, prefix: str) -> None:
        super().__init__()
        self._stack, self._prefix = stack, prefix

    def forward(self, x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [N, M]."""

        def run(expert: int, x: Tensor) -> Tensor:
            gate, up, down = (self._stack.expert(self._prefix + n, expert) for n in ("gate_proj", "up_proj", "down_proj"))
            inner = nn.functional.silu(nn.functional.linear(x, gate)) * nn.functional.linear(x, up)
            return nn.functional.linear(inner, down)

        return combine_experts(x_NM, weight_Nk, index_Nk, self._stack.config.num_experts, run)


class DerivedStack:
    """The student of a stack: its layers, with new, unfitted mixers where the configurations differ."""

    def __init__(self, source: Stack, config: ModelConfig) -> None:
        self.source, self.config = source, config
        self._rope = Rope(config)
        self._held: tuple[int, Layer] | None = None

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The source's."""
        return self.source.embed(ids_BT)

    def rope(self, ids_BT: Tensor) -> RopeTables:
        """Rotation tables for windows of this length; MLA's widths are the student's."""
        return self._rope(ids_BT, 0, None)

    def layer(self, index: int) -> Layer:
        """The source's layer with the student's mixer."""
        if self._held is None or self._held[0] != index:
            self._held = None
            self._held = index, derive_layer(self.source.layer(index), self.source.config, self.config, index)
        return self._held[1]

    def norm(self, h_BTM: Tensor) -> Tensor:
        """The source's."""
        return self.source.norm(h_BTM)


def empty_layer(config: ModelConfig, index: int) -> Layer:
    """A layer with uninitialised weights."""
    return Layer(config, index) if index < config.num_hidden_layers else MtpLayer(config, index)


def derive_layer(layer: Layer, source: ModelConfig, config: ModelConfig, index: int) -> Layer:
    """A layer that shares every tensor with `layer` but those of a mixer that changes kind, which are `unfitted`."""
    if config.layer_kind(index) == source.layer_kind(index):
        return layer
    like = layer.input_layernorm.weight
    with torch.device("meta"):
        new = empty_layer(config, index)
    attention = {f"attention.{name}": unfitted(name, t, like) for name, t in new.attention.state_dict().items()}
    new.mlp = layer.mlp  # experts that are read from disk are no tensors
    shared = {name: t for name, t in layer.state_dict().items() if not name.startswith("attention.")}
    new.load_state_dict(shared | attention, assign=True)
    return new.eval()


def unfitted(name: str, shape_of: Tensor, like: Tensor) -> Tensor:
    """Where a new mixer starts before it is fitted: unit norms, zero matrices and biases; dtype and device of `like`."""
    norm = shape_of.dim() == 1 and not name.endswith("bias")
    return torch.full(shape_of.shape, float(norm), device=like.device, dtype=like.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Residual streams
# ---------------------------------------------------------------------------------------------------------------------


class Streams(Protocol):
    """Where the residual streams of the calibration windows are kept between two layers."""

    def resume(self) -> tuple[int, list[Sequence[Tensor]]] | None:
        """The next layer and the streams in front of it, where an earlier walk left them."""

    def keep(self, streams: list[Iterator[Tensor]], layer: int | None) -> list[Sequence[Tensor]]:
        """Consume the streams; they stand in front of `layer` (None: on the way to it, nothing to resume from)."""


T = TypeVar("T")


class Mapped(Sequence[Tensor], Generic[T]):
    """Tensors that a function makes of tensors, or of numbers, whenever they are read; none is kept."""

    def __init__(self, items: Sequence[T], function: Callable[[T], Tensor]) -> None:
        self._items, self._function = items, function

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return Mapped(self._items[index], self._function)
        return self._function(self._items[index])


class MemoryStreams:
    """Streams in memory; nothing is resumed."""

    def resume(self) -> None:
        """Nothing."""

    def keep(self, streams: list[Iterator[Tensor]], layer: int | None) -> list[Sequence[Tensor]]:
        """All tensors."""
        return [list(stream) for stream in streams]
