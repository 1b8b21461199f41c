"""Parameters, cache bytes, FLOPs and training memory, counted from a `ModelConfig` alone. No torch here.

Parameters are listed as tensor shapes, the same ones `ling.py` builds; everything else is read off those lists.
The router's selection bias is a buffer, not a parameter, and is left out (256 values per expert layer).

*Active* parameters are those one token meets without MTP: embeddings, LM head, norms, mixers, router, shared expert and
`num_experts_per_tok` routed experts. This definition reproduces the published 7.4 B (Ling-2.6-flash), 63 B (2.6-1T),
51 B (Ling-1T), 6.1 B (flash-2.0) and 1.4 B (mini-2.0).

Letters: M hidden_size, V vocab_size, H heads, K key/value heads, D head dim, R kv_lora_rank, r rotated dims, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from openling.errors import UserError
from openling.model.config import LayerKind, ModelConfig

Shapes = list[tuple[int, ...]]

LIGHTNING_CHUNK = 64  # ops.lightning.CHUNK, which cannot be imported without torch


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def mixer_shapes(c: ModelConfig, kind: LayerKind) -> Shapes:
    """Tensors of one mixer, `attention.*` in the checkpoint: matrices [out, in], biases and norms [width]."""
    M, H, D = c.hidden_size, c.num_attention_heads, c.head_dim
    if kind == "mla":
        return _mla_shapes(c)
    kv_heads = c.num_key_value_heads if kind == "gqa" else H
    rows = (H + 2 * kv_heads) * D
    shapes: Shapes = [(rows, M), (M, H * D)]
    shapes += [(rows,)] * c.use_qkv_bias + [(M,)] * c.use_bias
    shapes += [(D,), (D,)] * (c.gqa_qk_norm if kind == "gqa" else c.use_qk_norm)
    if kind == "lightning":
        shapes += [(H * D, M), (H * D,)]
    return shapes


def _mla_shapes(c: ModelConfig) -> Shapes:
    M, H = c.hidden_size, c.num_attention_heads
    R, r, nope, value = c.kv_lora_rank or 0, c.qk_rope_head_dim or 0, c.qk_nope_head_dim or 0, c.v_head_dim or 0
    query_rows, rank = H * c.qk_head_dim, c.q_lora_rank
    shapes: Shapes = [(query_rows, M)] if rank is None else [(rank, M), (rank,), (query_rows, rank)]
    shapes += [(R + r, M), (R,), (H * (nope + value), R), (M, H * value)]
    if c.use_qkv_bias:
        shapes += [(query_rows if rank is None else rank,), (R + r,)]
    return shapes + [(M,)] * (c.use_qkv_bias or c.use_bias)


def feed_forward_shapes(c: ModelConfig, layer: int, *, active: bool = False) -> Shapes:
    """Tensors of one feed-forward part; `active`: only the routed experts that one token uses."""
    M = c.hidden_size

    def mlp(width: int) -> Shapes:
        return [(width, M), (width, M), (M, width)] + [(width,), (width,), (M,)] * c.mlp_bias

    if not c.is_moe(layer):
        return mlp(c.intermediate_size)
    experts, width = (c.num_experts_per_tok if active else c.num_experts), c.moe_intermediate_size
    shared = mlp(c.moe_shared_expert_intermediate_size) if c.num_shared_experts else []
    return [(c.num_experts, M), (experts, width, M), (experts, width, M), (experts, M, width), *shared]


def layer_shapes(c: ModelConfig, layer: int, *, active: bool = False) -> Shapes:
    """Tensors of one layer; layers from num_hidden_layers on are MTP layers."""
    M = c.hidden_size
    shapes = [(M,), (M,), *mixer_shapes(c, c.layer_kind(layer)), *feed_forward_shapes(c, layer, active=active)]
    return [*shapes, (M,), (M,), (M,), (M, 2 * M)] if layer >= c.num_hidden_layers else shapes


def size(shapes: Shapes) -> int:
    """Values in all tensors."""
    return sum(math.prod(shape) for shape in shapes)


def _backbone(c: ModelConfig, *, active: bool) -> int:
    M, V = c.hidden_size, c.vocab_size
    outer: Shapes = [(V, M), (M,)] + [(V, M)] * (not c.tie_word_embeddings)
    return size(outer) + sum(size(layer_shapes(c, i, active=active)) for i in range(c.num_hidden_layers))


def mtp_parameters(c: ModelConfig) -> int:
    """Parameters of all MTP layers; embeddings and LM head are shared with the model and not counted again."""
    return sum(size(layer_shapes(c, c.num_hidden_layers + k)) for k in range(c.num_nextn_predict_layers))


def total_parameters(c: ModelConfig, *, mtp: bool = False) -> int:
    """All parameters; tied embeddings count once, MTP layers only when asked for."""
    return _backbone(c, active=False) + (mtp_parameters(c) if mtp else 0)


def active_parameters(c: ModelConfig) -> int:
    """Parameters that one token meets, as defined at the top of this file."""
    return _backbone(c, active=True)


def attention_parameters(c: ModelConfig) -> int:
    """Parameters of the mixers of all hidden layers (no MTP)."""
    return sum(size(mixer_shapes(c, kind)) for kind in c.layer_kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding memory
# ---------------------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(c: ModelConfig, dtype_bytes: int = 2) -> int:
    """Cache growth per token of one sequence: 2KD values in a GQA layer, R + r in an MLA layer, none in a Lightning layer."""
    values = {
        "gqa": 2 * c.num_key_value_heads * c.head_dim,
        "mla": (c.kv_lora_rank or 0) + (c.qk_rope_head_dim or 0),
        "lightning": 0,
    }
    return dtype_bytes * sum(values[kind] for kind in c.layer_kinds)


def state_bytes_per_sequence(c: ModelConfig, dtype_bytes: int = 4) -> int:
    """Bytes of the Lightning states of one sequence, whatever its length: H matrices D x D per layer, FP32 by default."""
    return dtype_bytes * c.layer_kinds.count("lightning") * c.num_attention_heads * c.head_dim**2


def break_even_tokens(
    hybrid: ModelConfig, source: ModelConfig, *, kv_dtype_bytes: int = 2, state_dtype_bytes: int = 4
) -> int | None:
    """Context (rounded) from which a sequence of `hybrid` needs less memory than one of `source`; None if it never does."""
    saved = kv_bytes_per_token(source, kv_dtype_bytes) - kv_bytes_per_token(hybrid, kv_dtype_bytes)
    fixed = state_bytes_per_sequence(hybrid, state_dtype_bytes) - state_bytes_per_sequence(source, state_dtype_bytes)
    return max(0, round(fixed / saved)) if saved > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token: `attention` is the mixers with their projections, `rest` everything else."""

    attention: int
    rest: int

    @property
    def total(self) -> int:
        """Both parts."""
        return self.attention + self.rest


def forward_flops(c: ModelConfig, context: int) -> Flops:
    """FLOPs of the token at position `context` of a prefill or training forward pass, MTP not counted.

    A multiply-add is two FLOPs. Counted: every matrix product, that is 2 per active weight of a matrix (LM head
    included, embedding look-up not), plus the mixing: 4HD per visible key in GQA, 2H(Dqk + Dv) in MLA (expanded form),
    4HD(D + 64) in Lightning at any position (chunks of 64: inside a chunk, state read, state update). Not counted:
    norms, rotations, activations, softmax. The mean over a causal sequence of T tokens is the value at T / 2.
    """
    H, D = c.num_attention_heads, c.head_dim
    mixing = {
        "gqa": 4 * H * D * context,
        "mla": 2 * H * (c.qk_head_dim + (c.v_head_dim or 0)) * context,
        "lightning": 4 * H * D * (D + LIGHTNING_CHUNK),
    }

    def products(shapes: Shapes) -> int:
        return 2 * size([shape for shape in shapes if len(shape) > 1])

    attention = sum(products(mixer_shapes(c, kind)) + mixing[kind] for kind in c.layer_kinds)
    rest = sum(products(feed_forward_shapes(c, i, active=True)) for i in range(c.num_hidden_layers))
    return Flops(attention, rest + 2 * c.vocab_size * c.hidden_size)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConversionBytes:
    """Bytes of the tensors a conversion has to read and to write; all others travel unchanged."""

    read: int
    written: int


def conversion_bytes(source: ModelConfig, target: ModelConfig, dtype_bytes: int = 2) -> ConversionBytes:
    """Attention tensors of the layers whose kind changes (MTP layers too), and the embeddings when they are untied."""
    layers = range(source.num_hidden_layers + min(source.num_nextn_predict_layers, target.num_nextn_predict_layers))
    changed = [(source.layer_kind(i), target.layer_kind(i)) for i in layers if source.layer_kind(i) != target.layer_kind(i)]
    untied = source.vocab_size * source.hidden_size if source.tie_word_embeddings and not target.tie_word_embeddings else 0
    read = untied + sum(size(mixer_shapes(source, old)) for old, _ in changed)
    written = untied + sum(size(mixer_shapes(target, new)) for _, new in changed)
    return ConversionBytes(read * dtype_bytes, written * dtype_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Training memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """GPUs of a training job: dp (fully sharded) x tp x pp; expert parallelism reuses dp x tp."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.dp * self.tp * self.pp


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest GPU, part by part."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def training_memory(c: ModelConfig, mesh: Mesh, *, seq_len: int = 4096, micro_batch: int = 1) -> TrainingMemory:
    """Estimated bytes per GPU when every parameter trains in BF16 with AdamW; the fullest pipeline stage.

    Per parameter, sharded over dp x tp: 2 (BF16 weight) + 4 (FP32 gradient) + 12 (FP32 master and two moments).
    `gathered`, if dp > 1: the block at work, the one fetched ahead and the first's unreduced gradients, in BF16.
    `activations`, every block checkpointed, sequence-parallel inside tp: 2M bytes per token, layer and micro-batch in
    flight (pp - stage of them: one-forward-one-backward), plus what one block keeps for its backward once recomputed
    (`block_activation_bytes`). `logits`: BF16, FP32 and FP32 gradient, 10 bytes per logit; MTP logits are made in turn.
    Framework and communication buffers and fragmentation are not counted.
    """
    _check_mesh(c, mesh)
    tokens = micro_batch * seq_len
    stages = [_stage_memory(c, mesh, stage, tokens) for stage in range(mesh.pp)]
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(c: ModelConfig, mesh: Mesh, stage: int, tokens: int) -> TrainingMemory:
    """One pipeline stage: a run of layers, with the embeddings on the first, head and MTP on the last."""
    first, last = stage == 0, stage == mesh.pp - 1
    total = c.num_hidden_layers
    layers = list(range(stage * total // mesh.pp, (stage + 1) * total // mesh.pp))
    layers += range(total, total + c.num_nextn_predict_layers) if last else ()
    table = c.vocab_size * c.hidden_size
    # One table serves both ends only when they are on the same stage.
    tables = max(first, last) if c.tie_word_embeddings else first + last
    norm = c.hidden_size if last else 0
    parameters = math.ceil((tables * table + norm + sum(size(layer_shapes(c, i)) for i in layers)) / (mesh.dp * mesh.tp))
    units = [_gathered_values(layer_shapes(c, i), mesh) for i in layers] + [table // mesh.tp] * (tables > 0)
    saved = 2 * c.hidden_size * len(layers) * (mesh.pp - stage)
    working = max(block_activation_bytes(c, i) for i in layers)
    return TrainingMemory(
        parameters=2 * parameters,
        gradients=4 * parameters,
        optimizer=12 * parameters,
        gathered=3 * 2 * max(units) if mesh.dp > 1 else 0,
        activations=(saved + working) * tokens // mesh.tp,
        logits=10 * c.vocab_size * tokens // mesh.tp if last else 0,
    )


def _gathered_values(shapes: Shapes, mesh: Mesh) -> int:
    """Values of a block on one GPU while it works: experts are split over ep (at least tp), the rest over tp."""
    experts = size([shape for shape in shapes if len(shape) == 3])
    return (size(shapes) - experts) // mesh.tp + experts // max(mesh.ep, mesh.tp)


def block_activation_bytes(c: ModelConfig, layer: int) -> int:
    """Bytes per token that one block keeps for its backward pass: 4 per value, since the plain ops upcast to FP32.

    Counted: the input of every matrix product, norm, rotation, gate and activation, once, and two Lightning states per
    chunk. Routed experts count `num_experts_per_tok` times (balanced load). Within 40 % of what autograd saves.
    """
    M, H, D, kind = c.hidden_size, c.num_attention_heads, c.head_dim, c.layer_kind(layer)
    if kind == "mla":
        R, r, Dv, rank = c.kv_lora_rank or 0, c.qk_rope_head_dim or 0, c.v_head_dim or 0, c.q_lora_rank or 0
        # Low-rank query and latent before and after their norms; k_nope and v; queries and keys as attention takes them; output.
        mixer = 2 * rank + 2 * R + r + H * ((c.qk_nope_head_dim or 0) + Dv) + 2 * H * c.qk_head_dim + H * Dv
    else:
        kv_heads = c.num_key_value_heads if kind == "gqa" else H
        # Projected q, k, v; normed and rotated q, k; attention's output.
        mixer = (H + 2 * kv_heads) * D + (H + kv_heads) * D + H * D
    # Lightning: normed output, gate, gated output, and the states.
    lightning = 3 * H * D + 2 * H * D * D // LIGHTNING_CHUNK if kind == "lightning" else 0
    if c.is_moe(layer):
        # Per expert: dispatched input and output; gate, up, silu(gate), product. Then the shared expert and the scores.
        routed = c.num_experts_per_tok * (2 * M + 4 * c.moe_intermediate_size)
        ffn = routed + 4 * c.moe_shared_expert_intermediate_size + c.num_experts
    else:
        ffn = 4 * c.intermediate_size
    return 4 * (4 * M + mixer + lightning + ffn)  # 4M: both norms' inputs and outputs


def smallest_data_parallel(c: ModelConfig, mesh: Mesh, budget: int, *, seq_len: int, micro_batch: int) -> int | None:
    """Smallest dp = mesh.dp x 2^k whose training memory is within `budget` bytes per GPU; None if sharding never suffices."""
    for doubling in range(16):
        wider = dataclasses.replace(mesh, dp=mesh.dp * 2**doubling)
        if training_memory(c, wider, seq_len=seq_len, micro_batch=micro_batch).total <= budget:
            return wider.dp
    return None


def _check_mesh(c: ModelConfig, mesh: Mesh) -> None:
    """Refuse a mesh the model cannot be laid out on."""

    def check(ok: bool, where: str, expected: str) -> None:
        if not ok:
            raise UserError("this mesh does not fit the model", where=f"--{where}", value=getattr(mesh, where), expected=expected)

    for name in ("dp", "tp", "pp", "ep"):
        check(getattr(mesh, name) >= 1, name, "a positive integer")
    check(c.num_attention_heads % mesh.tp == 0, "tp", f"a divisor of num_attention_heads = {c.num_attention_heads}")
    if "lightning" in c.layer_kinds:
        # The grouped output norm needs no all-reduce as long as no group is cut.
        check(c.group_norm_size % mesh.tp == 0, "tp", f"a divisor of group_norm_size = {c.group_norm_size}")
    check(mesh.pp <= c.num_hidden_layers, "pp", f"at most num_hidden_layers = {c.num_hidden_layers}")
    check(mesh.ep == 1 or bool(c.moe_layers), "ep", "1: the model has no experts")
    check(mesh.ep == 1 or c.num_experts % mesh.ep == 0, "ep", f"a divisor of num_experts = {c.num_experts}")
    check(mesh.dp * mesh.tp % mesh.ep == 0, "ep", f"a divisor of dp x tp = {mesh.dp * mesh.tp}")
