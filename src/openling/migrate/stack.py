"""What a walk through the layers reads: a model in memory, or a folder of any size from which one layer at a time is held.

The walk, the fits and the student are the same for both (`calibrate.py`, `convert.py`); only the source of layers differs.
Legend: B windows of a batch, T tokens, M hidden size, N tokens, E experts, F expert width.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from openling.model.config import ModelConfig
from openling.model.ling import CallContext, Layer, Ling, MtpLayer, Rope, RopeTables, SparseMoE
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
    `room`: bytes for what experts give to tokens before it is summed; the more, the fewer times an expert is read.
    """

    def __init__(self, opened: Opened, device: torch.device, *, mixers_only: bool = False, room: int = 0) -> None:
        self.opened, self.config, self.device, self.mixers_only, self.room = opened, opened.config, device, mixers_only, room
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
    """`Experts` whose matrices are read when their expert has tokens, and dropped after it: once for all batches of `prepare`."""

    def __init__(self, stack: FolderStack, prefix: str) -> None:
        super().__init__()
        self._stack, self._prefix = stack, prefix
        self._prepared: deque[Tensor] = deque()

    def forward(self, x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [N, M]; the next one of those prepared, if there are any."""
        if not self._prepared:
            self.prepare([(x_NM, weight_Nk, index_Nk)])
        return self._prepared.popleft()

    def together(self, tokens: int) -> int:
        """Batches of so many tokens, one at least, whose experts' rows are within the stack's room."""
        c = self._stack.config
        return max(1, self._stack.room // (rows_bytes(c) * tokens))

    def prepare(self, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Compute what the next calls of `forward` give, of x [N, M], weights and choices [N, k] of each."""
        count, k = self._stack.config.num_experts, batches[0][2].shape[1]
        choices = [index.flatten() for _, _, index in batches]
        places_E = [c.argsort(stable=True).split(torch.bincount(c, minlength=count).tolist()) for c in choices]
        rows: dict[int, Tensor] = {}
        for expert in range(count):
            places = [of_batch[expert] for of_batch in places_E]
            if not any(len(place) for place in places):
                continue
            gate, up, down = (self._stack.expert(self._prefix + n, expert) for n in ("gate_proj", "up_proj", "down_proj"))
            for b, ((x, _, _), place) in enumerate(zip(batches, places, strict=True)):
                if not len(place):
                    continue
                mine = x.index_select(0, place // k)
                inner = nn.functional.silu(nn.functional.linear(mine, gate)) * nn.functional.linear(mine, up)
                found = nn.functional.linear(inner, down)
                if b not in rows:
                    rows[b] = found.new_empty(len(x) * k, x.shape[1])
                rows[b][place] = found
        for b, (x, weight, _) in enumerate(batches):  # every token has chosen
            self._prepared.append(weighted_sum(rows.pop(b).unflatten(0, weight.shape), weight).to(x.dtype))


def rows_bytes(config: ModelConfig) -> int:
    """Bytes of a token on its way through the experts, FP32: what each of them gives, the sum, and what goes around them."""
    return 4 * (config.num_experts_per_tok + 3) * config.hidden_size


def weighted_sum(rows_NkM: Tensor, weight_Nk: Tensor, step: int = 256) -> Tensor:
    """Sum over a token's experts in FP32, [N, M], as `combine_experts` takes it; a few tokens at a time: no copy of all rows."""
    parts = zip(rows_NkM.split(step), weight_Nk.split(step), strict=True)
    return torch.cat([(rows.float() * weight.float()[..., None]).sum(1) for rows, weight in parts])


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


def pass_layers(
    layers: Sequence[Layer], batches: Iterable[tuple[Tensor, ...]], calls: Sequence[CallContext]
) -> Iterator[tuple[Tensor, ...]]:
    """A batch [B, T, M] of every stream through its layer. The layers may differ in their mixers alone.

    Where routed experts are read from the disk, as many batches of all streams go through an expert at once as have room.
    """
    mlp = layers[0].mlp
    experts = mlp.experts if isinstance(mlp, SparseMoE) else None
    if not isinstance(experts, DiskExperts):
        for streams in batches:
            yield tuple(Layer.forward(layer, h, call) for layer, h, call in zip(layers, streams, calls, strict=True))
        return
    waiting = iter(batches)
    while first := next(waiting, None):
        more = experts.together(sum(h.shape[:2].numel() for h in first)) - 1
        mixed: list[tuple[Tensor, Tensor]] = []
        for streams in itertools.chain([first], itertools.islice(waiting, more)):
            for layer, h, call in zip(layers, streams, calls, strict=True):
                mixed.append(layer.post_attention_layernorm.add(h, layer.attention(layer.input_layernorm(h), call)))
        flat = [normed.flatten(0, 1) for _, normed in mixed]
        experts.prepare([(x, *mlp.gate(x)) for x in flat])
        done = [h + mlp(normed) for h, normed in mixed]
        yield from zip(*[iter(done)] * len(layers), strict=True)


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

    def keep(self, batches: Iterable[tuple[Tensor, ...]], layer: int | None) -> list[Sequence[Tensor]]:
        """Consume the streams, a batch of all at a time; they stand in front of `layer` (None: on the way to it)."""


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

    def keep(self, batches: Iterable[tuple[Tensor, ...]], layer: int | None) -> list[Sequence[Tensor]]:
        """All tensors."""
        return [list(stream) for stream in zip(*batches, strict=True)]
