"""What autograd keeps of one layer for its backward pass, tensor by tensor, as bytes. No torch here.

Two forms, because the ops have two (`ops.pick`): "kernels", BF16 on a GPU, where the Triton kernels keep little, and "plain",
FP32 on a CPU. A tensor that several ops keep is one storage and is listed once, under the op that makes it necessary. Weights
and rotation tables are left out: they exist anyway. Both lists are held to `torch.autograd.graph.saved_tensors_hooks`, byte for
byte, in `tests/plan/test_saved_activations.py`; the kernels through the meta device, on which their autograd rules run unchanged.

Letters: N tokens of this rank, S keys they attend to, M hidden_size, H heads, K key/value heads, D head dim, R kv_lora_rank,
r rotated dims, E experts, k experts per token, F feed-forward width, C tokens of a Lightning chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from openling.model.config import ModelConfig
from openling.model.count import LIGHTNING_CHUNK

Form = Literal["kernels", "plain"]
Part = Literal["mixer", "feed-forward"]
Policy = Literal["none", "selective", "layer"]
POLICIES: tuple[Policy, ...] = ("none", "selective", "layer")  # from most memory to least
# Rows of a tile of the grouped products: `ops.kernels.moe_sort.UNIT` and its tiles, which cannot be imported without Triton.
EXPERT_ROWS, EXPERT_TILE = 64, 128


@dataclass(frozen=True)
class Saved:
    """One kept tensor: what it is, its bytes, and which half of the layer keeps it."""

    name: str
    bytes: int
    part: Part


@dataclass(frozen=True)
class Cut:
    """How a layer's work is split over ranks: heads and widths over `tensor`, tokens over `context`, experts over `expert`."""

    tensor: int = 1
    context: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Rows:
    """A micro-batch on one rank: sequences, and the tokens of each that this rank has."""

    sequences: int
    tokens: int

    @property
    def total(self) -> int:
        """N."""
        return self.sequences * self.tokens


def layer_saved(c: ModelConfig, layer: int, rows: Rows, *, form: Form = "kernels", cut: Cut | None = None) -> list[Saved]:
    """Everything one layer keeps without checkpointing; layers from num_hidden_layers on are MTP layers.

    With `tensor` ranks heads and widths are split; the residual stream, the norms' outputs and MLA's latents are whole on each.
    With `context` ranks MLA and GQA layers keep keys and values of all tokens: the last rank reads them all.
    """
    cut = cut or Cut()
    keep = _Keeper(rows.total, form, cut.tensor)
    keep.normed("residual stream before the mixer", c.hidden_size, "mixer")
    keep.whole("normed input of the mixer", c.hidden_size, "mixer")
    kind = c.layer_kind(layer)
    {"lightning": _lightning, "gqa": _gqa, "mla": _mla}[kind](c, rows, keep, cut)
    keep.normed("residual stream before the feed-forward part", c.hidden_size, "mixer")
    keep.whole("normed input of the feed-forward part", c.hidden_size, "feed-forward")
    if c.is_moe(layer):
        _experts(c, rows.total, keep, cut)
        if c.num_shared_experts:
            keep.mlp("shared expert", c.moe_shared_expert_intermediate_size)
    else:
        keep.mlp("MLP", c.intermediate_size)
    if layer >= c.num_hidden_layers:
        keep.normed("embeddings of the next tokens", c.hidden_size, "mixer")
        keep.normed("hidden states that join them", c.hidden_size, "mixer")
        keep.whole("both, normed and joined: input of eh_proj", 2 * c.hidden_size, "mixer")
        keep.normed("input of the final norm", c.hidden_size, "mixer")
    return keep.found


def product_outputs(c: ModelConfig, layer: int, rows: Rows, *, cut: Cut | None = None) -> int:
    """Bytes that policy "selective" keeps besides a layer's input, in the kernels' form: results of products and of attention.

    Products that are kernels of ours (experts, router, recurrence) are made again.
    """
    cut = cut or Cut()
    M, H, D, t = c.hidden_size, c.num_attention_heads, c.head_dim, cut.tensor
    keys, kind = cut.context, c.layer_kind(layer)
    whole, split, floats = M, 0, 0  # M: output of dense
    if kind == "lightning":
        split += 4 * H * D
    elif kind == "gqa":
        split += (H + 2 * c.num_key_value_heads) * D + H * D
        floats += H
    else:
        nope, value, rank = c.qk_nope_head_dim or 0, c.v_head_dim or 0, c.q_lora_rank or 0
        whole += rank + (c.kv_lora_rank or 0) + (c.qk_rope_head_dim or 0)
        split += H * c.qk_head_dim + H * (nope + value) * keys + H * value
        floats += H
    if not c.is_moe(layer):
        split, whole = split + 2 * c.intermediate_size, whole + M
    elif c.num_shared_experts:
        split, whole = split + 2 * c.moe_shared_expert_intermediate_size, whole + M
    if layer >= c.num_hidden_layers:
        whole += M
    random = 16 if floats else 0
    return rows.total * (2 * whole + -(-2 * split // t) + 4 * floats // t) + random


@dataclass(frozen=True)
class LayerBytes:
    """What a layer keeps from forward to backward, and what exists besides while its own backward pass runs."""

    kept: int
    recomputed: int


def layer_bytes(c: ModelConfig, layer: int, rows: Rows, policy: Policy, *, cut: Cut | None = None) -> LayerBytes:
    """By activation checkpointing policy: "layer" keeps the input alone, "selective" also results of products and attention."""
    everything = sum(s.bytes for s in layer_saved(c, layer, rows, cut=cut))
    # An MTP layer has two inputs.
    inputs = 2 * rows.total * c.hidden_size * (2 if layer >= c.num_hidden_layers else 1)
    if policy == "none":
        return LayerBytes(everything, 0)
    if policy == "layer":
        return LayerBytes(inputs, everything)
    products = product_outputs(c, layer, rows, cut=cut)
    return LayerBytes(inputs + products, max(0, everything - products))


class _Keeper:
    """Collects tensors. Widths are values per token, whole or split over the tensor ranks; `value` is the bytes of one."""

    def __init__(self, tokens: int, form: Form, tensor: int) -> None:
        self.tokens, self.form, self.tensor = tokens, form, tensor
        self.value = 2 if form == "kernels" else 4
        self.found: list[Saved] = []

    def add(self, name: str, count: int, part: Part) -> None:
        if count:
            self.found.append(Saved(name, count, part))

    def whole(self, name: str, width: int, part: Part) -> None:
        self.add(name, self.tokens * width * self.value, part)

    def split(self, name: str, width: int, part: Part, tokens: int | None = None) -> None:
        self.add(name, -(-(self.tokens if tokens is None else tokens) * width // self.tensor) * self.value, part)

    def normed(self, name: str, width: int, part: Part, *, split: bool = False, groups: int = 1) -> None:
        """The input of a norm; the plain form keeps 1 / rms of every row (and group) besides."""
        (self.split if split else self.whole)(name, width, part)
        if self.form == "plain":
            (self.split if split else self.whole)(f"1 / rms of the {name}", groups, part)

    def mlp(self, name: str, width: int) -> None:
        """SwiGLU's two inputs and its output; the plain form keeps silu(gate) too."""
        for what in ("gate", "up", "silu(gate) * up", "silu(gate)")[: 3 if self.form == "kernels" else 4]:
            self.split(f"{name}: {what}", width, "feed-forward")


def _lightning(c: ModelConfig, rows: Rows, keep: _Keeper, cut: Cut) -> None:
    width = c.num_attention_heads * c.head_dim
    if keep.form == "kernels":
        keep.split("q, k, v as projected", 3 * width, "mixer")  # v is read from here
        keep.split("q, k normed and rotated", 2 * width, "mixer")
        if c.linear_silu:
            keep.split("v after silu", width, "mixer")
        keep.split("output of the recurrence", width, "mixer")
    else:
        _plain_heads(c, keep, c.num_attention_heads, c.use_qk_norm, silu=c.linear_silu)
        _plain_chunks(c, rows, keep)
        keep.normed("output of the recurrence", width, "mixer", split=True, groups=c.group_norm_size)
        keep.split("normed output", width, "mixer")
    keep.split("gate" if keep.form == "kernels" else "sigmoid(gate)", width, "mixer")
    keep.split("gated output: input of dense", width, "mixer")


def _plain_heads(c: ModelConfig, keep: _Keeper, kv_heads: int, qk_norm: bool, *, silu: bool = False) -> None:
    """What the plain `split_norm_rope` keeps: rows of [q | k | v] where they are normed or go through silu."""
    both, every = c.num_attention_heads + kv_heads, c.num_attention_heads + 2 * kv_heads
    if silu:
        keep.split("q, k, v as projected, before silu", every * c.head_dim, "mixer")
    if qk_norm:
        keep.split("q, k, v before the norm", every * c.head_dim, "mixer")
        keep.split("1 / rms of every q and k", both, "mixer")
        keep.add("weights of the norm, once per head", both * c.head_dim * keep.value // keep.tensor, "mixer")


def _plain_chunks(c: ModelConfig, rows: Rows, keep: _Keeper) -> None:
    """`ops.lightning._ChunkForm`: q, k, v and scores by chunks, a state per chunk, and the decays."""
    H, D, C = c.num_attention_heads // keep.tensor, c.head_dim, LIGHTNING_CHUNK
    chunks = rows.sequences * -(-rows.tokens // C)
    lengths = 1 if rows.tokens % C == 0 else chunks  # chunks of one length share their decays
    for what in "qkv":
        keep.add(f"{what} by chunks", chunks * H * C * D * keep.value, "mixer")
    keep.add("scores inside each chunk", chunks * H * C * C * keep.value, "mixer")
    keep.add("state before each chunk", chunks * H * D * D * keep.value, "mixer")
    decays = H * C * C + H * C + lengths * (H * C + H)
    keep.add("decays within, into and over a chunk", decays * keep.value, "mixer")
    if lengths > 1:
        # int64 numbers of tokens, and four boolean masks: of q, of k, of v and of the output.
        keep.add("which token is where in padded chunks, and back", chunks * C * (8 + 1) + rows.total * 8, "mixer")


def _gqa(c: ModelConfig, rows: Rows, keep: _Keeper, cut: Cut) -> None:
    D, H, K = c.head_dim, c.num_attention_heads, c.num_key_value_heads
    keys = keep.tokens * cut.context
    if keep.form == "kernels":
        keep.split("q, k, v as projected", (H + 2 * K) * D, "mixer")  # v is read from here
        keep.split("q normed and rotated", H * D, "mixer")
        keep.split("k normed and rotated", K * D, "mixer", keys)
        if cut.context > 1:
            keep.split("v of all ranks", K * D, "mixer", keys)
    else:
        _plain_heads(c, keep, K, c.gqa_qk_norm)
        for what, heads, count in (("q", H, keep.tokens), ("k", K, keys), ("v", K, keys)):
            keep.split(f"{what} as attention reads it", heads * D, "mixer", count)
    _attention_output(keep, H * D, H)


def _attention_output(keep: _Keeper, width: int, heads: int) -> None:
    keep.split("output of attention: input of dense", width, "mixer")
    if keep.form == "kernels":
        keep.add("log-sum-exp of every query", keep.tokens * heads // keep.tensor * 4, "mixer")
        keep.add("random state of attention, unused", 16, "mixer")


def _mla(c: ModelConfig, rows: Rows, keep: _Keeper, cut: Cut) -> None:
    H, R, r = c.num_attention_heads, c.kv_lora_rank or 0, c.qk_rope_head_dim or 0
    nope, value = c.qk_nope_head_dim or 0, c.v_head_dim or 0
    keys = keep.tokens * cut.context
    if c.q_lora_rank:
        keep.normed("query latent", c.q_lora_rank, "mixer")
        keep.whole("query latent, normed", c.q_lora_rank, "mixer")
    keep.whole("key/value latent and shared key", R + r, "mixer")
    if keep.form == "plain":
        keep.whole("1 / rms of the latent", 1, "mixer")
    # Alone the normed latent is a tensor of its own; gathered, it lies beside the shared rotated key.
    keep.add("latent, normed, of all ranks", keys * (R + (r if cut.context > 1 else 0)) * keep.value, "mixer")
    if keep.form == "kernels":
        keep.split("k without rotation, v", H * (nope + value), "mixer", keys)
        keep.split("q rotated", H * c.qk_head_dim, "mixer")
        keep.split("k with the shared rotated part", H * c.qk_head_dim, "mixer", keys)
    else:
        keep.split("q as attention reads it", H * c.qk_head_dim, "mixer")
        keep.split("k as attention reads it", H * c.qk_head_dim, "mixer", keys)
        keep.split("v as attention reads it", H * value, "mixer", keys)
    _attention_output(keep, H * value, H)


def _experts(c: ModelConfig, tokens: int, keep: _Keeper, cut: Cut) -> None:
    """Router and routed experts, at a balanced load: every rank's experts get N k rows in all.

    With `expert` ranks the rows for the local experts are kept too, each with its place. Tensor ranks split the experts' width.
    """
    E, k, F = c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size
    entries = tokens * k
    part: Part = "feed-forward"
    if keep.form == "plain":
        _plain_experts(c, tokens, keep)
        return
    keep.add("router: chosen experts, int64", entries * 8, part)
    keep.add("router: logits FP32", tokens * E * 4, part)
    keep.add("router: weights FP32", entries * 4, part)
    local = E // cut.expert
    if cut.expert > 1:
        keep.add("rows for local experts", entries * c.hidden_size * 2, part)
        # Of every row its token, its slot and its expert; of every travelling row its token.
        keep.add("places of the rows, int64", int(entries * 3 + tokens * copies(c, cut.expert)) * 8, part)
    padded = expert_rows(entries, local)
    keep.add("experts: gate and up", padded * 2 * (F // keep.tensor) * 2, part)
    tiles = entries // EXPERT_TILE + min(local, entries)
    keep.add("experts: which row is whose, int32", 4 * (2 * local + 1 + entries + padded + 4 * (1 + tiles)), part)


def copies(c: ModelConfig, ranks: int) -> float:
    """How many expert ranks a token is sent to: it goes once to each that has experts for it, whatever their number there.

    The mean for choices that are uniform inside the groups that compete, groups uniform too; at most min(ranks, k).
    """
    groups, chosen, k = max(1, c.n_group), max(1, c.topk_group), c.num_experts_per_tok
    if ranks >= groups:
        reached = chosen * ranks / groups
    else:
        share = groups // ranks  # groups on one rank
        reached = ranks * (1 - math.comb(groups - share, chosen) / math.comb(groups, chosen))
    return reached * (1 - (1 - 1 / reached) ** k) if reached > 1 else 1.0


def expert_rows(entries: int, experts: int) -> int:
    """Rows of the grouped products: every expert's begin at a multiple of EXPERT_ROWS, whatever the distribution."""
    return (entries + (EXPERT_ROWS - 1) * min(experts, entries)) // EXPERT_ROWS * EXPERT_ROWS


def _plain_experts(c: ModelConfig, tokens: int, keep: _Keeper) -> None:
    E, k, F = c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size
    part: Part = "feed-forward"
    keep.add("router: scores", tokens * E * 4, part)
    if c.n_group > 1:
        keep.add("router: two best of each group, int64", tokens * c.n_group * 2 * 8, part)
        keep.add("router: best groups, int64", tokens * c.topk_group * 8, part)
        keep.add("router: which groups compete, bool", tokens * c.n_group, part)
    keep.add("router: chosen experts, int64", tokens * k * 8, part)
    if c.norm_topk_prob and k > 1:
        keep.add("router: weights and their sum", tokens * (k + 1) * 4, part)
    keep.add("experts: order of the rows and their places, int64", tokens * k * 16, part)
    keep.add("experts: weight of every row", tokens * k * 4, part)
    keep.add("experts: input and output of every row", tokens * k * 2 * c.hidden_size * 4, part)
    keep.add("experts: gate, silu(gate), up and product of every row", tokens * k * 4 * F * 4, part)


def outer_saved(c: ModelConfig, rows: Rows, *, form: Form = "kernels", tensor: int = 1) -> list[Saved]:
    """What the model keeps outside its layers: token ids (int64) and the input of the final norm."""
    keep = _Keeper(rows.total, form, tensor)
    keep.add("token ids", rows.total * 8, "mixer")
    keep.normed("input of the final norm", c.hidden_size, "mixer")
    return keep.found
