"""The hybrid model in one file, top-down: GQA, Lightning and MLA layers, dense and sparse feed-forward, MTP.

The same code runs a GQA teacher, a half-migrated model and the finished hybrid: `config.layer_kinds` says which mixer
each layer has. It trains, prefills and decodes: without a cache a call sees whole sequences, with one it continues them.
Module and parameter names are those of the released Ling checkpoints; routed experts are stacked along a leading dim.

Legend: B batch, T new tokens, S cached and new tokens, M hidden_size, V vocabulary, H heads, K key/value heads,
D head dim, R kv_lora_rank, r rotated dims, E experts, F expert width; in MLA E a head's query width, Dv its value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openling.model.cache import Cache, LayerMemory, Memory, consecutive_positions
from openling.model.config import ModelConfig
from openling.ops.attention import absorbed_attention, absorbed_is_cheaper, softmax_attention
from openling.ops.fused import (
    add_rms_norm,
    gated_group_norm,
    latent_qkv,
    split_norm_rope,
    swiglu,
)
from openling.ops.lightning import lightning, log_decay_on
from openling.ops.moe import count_tokens, moe, route, swiglu_experts
from openling.ops.norm import group_rms_norm, rms_norm, stream_kernels
from openling.ops.rope import apply_rope, rope_frequencies, rope_tables, yarn_mscale


class Ling(nn.Module):
    """Backbone and LM head. `model(input_ids)` returns FP32 logits [B, T, V]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Memory | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """FP32 logits [B, T, V] for input_ids [B, T].

        cache: continue its sequences and remember these tokens. cu_seqlens [N + 1]: the single row packs N documents.
        attention_mask [B, T]: 0 marks left padding. hidden_states: a list that receives L + 1 tensors [B, T, M]: the
        embeddings, the output of every layer but the last, and the output of the final norm.
        """
        h = self.model(input_ids, cache=cache, cu_seqlens=cu_seqlens, attention_mask=attention_mask, hidden_states=hidden_states)
        return self.logits(h)

    def logits(self, h_BTM: Tensor) -> Tensor:
        """LM head, cast to FP32 after the product (as the official code does); FP64 models stay in FP64."""
        out = self.lm_head(h_BTM)
        return out if out.dtype == torch.float64 else out.float()

    def mtp_logits(self, input_ids: Tensor, h_BTM: Tensor) -> list[Tensor]:
        """Logits of each MTP layer, [B, T, V]: layer k at position t predicts token t + k + 2.

        h_BTM is the backbone's output after the final norm. Ids shift left by one per layer, the last filled with 0.
        """
        out: list[Tensor] = []
        for layer in self.model.mtp_layers():
            input_ids = F.pad(input_ids[:, 1:], (0, 1))
            h_BTM = layer(h_BTM, self.model.word_embeddings(input_ids), self.model.rope(input_ids, 0, None))
            out.append(self.logits(h_BTM))
        return out

    def new_cache(self) -> Cache:
        """An empty cache for this model."""
        return Cache(self.config.num_hidden_layers)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, initializer_range) matrices, unit norms, zero biases."""
        for name, parameter in self.named_parameters():
            first_values(name, parameter, self.config.initializer_range, generator)


@torch.no_grad()
def first_values(name: str, tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Put the values in with which training of a parameter, or a router's bias, begins."""
    if name.endswith("bias"):
        return tensor.zero_()
    return tensor.fill_(1.0) if tensor.dim() == 1 else tensor.normal_(0.0, std, generator=generator)


class Backbone(nn.Module):
    """Embeddings, layers, final norm. MTP layers sit behind the hidden layers, as in the checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there it would import torch's compiler, to draw nothing: a third of a server's start
            nn.init.normal_(weight)
        self.word_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)
        hidden = [Layer(config, i) for i in range(config.num_hidden_layers)]
        mtp = [MtpLayer(config, config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList([*hidden, *mtp])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)

    def layer(self, index: int) -> Layer:
        """A hidden layer, or an MTP layer behind them."""
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer

    def mtp_layers(self) -> list[MtpLayer]:
        """The multi-token-prediction layers, if any."""
        return [layer for layer in self.layers if isinstance(layer, MtpLayer)]

    def embed(self, input_ids: Tensor) -> Tensor:
        """The residual stream [B, T, M] before the first layer.

        Under autocast on a GPU it has autocast's dtype, as it has where FSDP gathers half-precision weights.
        """
        h = self.word_embeddings(input_ids)
        return h.to(torch.get_autocast_dtype("cuda")) if h.is_cuda and torch.is_autocast_enabled("cuda") else h

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Memory | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Output of the final norm [B, T, M]; arguments as in `Ling.forward`."""
        tables = self.rope(input_ids, 0, cu_seqlens) if cache is None else self.rope.at(cache.positions(input_ids, cu_seqlens))
        key_mask = attention_mask
        if cache is not None:
            batch, tokens = input_ids.shape
            key_mask = cache.extend_mask(attention_mask, batch, tokens, input_ids.device)
        call = CallContext(tables, cu_seqlens, key_mask)
        h = self.embed(input_ids)
        for i in range(self.config.num_hidden_layers):
            if hidden_states is not None:
                hidden_states.append(h)
            h = self.layers[i](h, call, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.advance(tokens)
        h = self.norm(h)
        if hidden_states is not None:
            hidden_states.append(h)
        return h


class CallContext:
    """What every layer of one call shares: rotation tables, document bounds, padding."""

    def __init__(self, tables: RopeTables, cu_seqlens: Tensor | None, key_mask: Tensor | None) -> None:
        self.tables = tables
        self.cu_seqlens = cu_seqlens
        self.key_mask = key_mask

    def part(self, tokens: slice) -> CallContext:
        """The same for some of the tokens, as one document without padding."""
        (cos, sin), (cos_r, sin_r) = self.tables.head, self.tables.latent
        tables = RopeTables((cos[:, tokens], sin[:, tokens]), (cos_r[:, tokens], sin_r[:, tokens]))
        return CallContext(tables, None, None)


class Layer(nn.Module):
    """Pre-norm block: h += mixer(norm(h)); h += feed_forward(norm(h))."""

    attention: GroupedQueryAttention | LightningAttention | LatentAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MIXERS[config.layer_kind(layer)](config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoE(config) if config.is_moe(layer) else MLP(config, config.intermediate_size)

    def forward(self, h_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """[B, T, M] to [B, T, M]."""
        mixed = self.attention(self.input_layernorm(h_BTM), call, cache)
        h_BTM, normed = self.post_attention_layernorm.add(h_BTM, mixed)
        return h_BTM + self.mlp(normed)


class MtpLayer(Layer):
    """One multi-token-prediction step: joins the next token's embedding with the hidden state, then an ordinary block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        h_BTM: Tensor,
        embedded_BTM: Tensor,
        tables: RopeTables,
        cache: LayerMemory | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """h [B, T, M] and the embeddings of the tokens one ahead; returns [B, T, M] after `final_layernorm`."""
        call = CallContext(tables, cu_seqlens, None)
        return self.final_layernorm(super().forward(self.join(h_BTM, embedded_BTM), call, cache))

    def join(self, h_BTM: Tensor, embedded_BTM: Tensor) -> Tensor:
        """The block's input [B, T, M]: embedding first, each half normed."""
        return self.eh_proj(torch.cat((self.enorm(embedded_BTM), self.hnorm(h_BTM)), dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# Mixers
# ---------------------------------------------------------------------------------------------------------------------


class GroupedQueryAttention(nn.Module):
    """Softmax attention with K shared key/value heads; rows of `query_key_value` are [Q | K | V], head-major."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        if config.gqa_qk_norm:
            self.query_layernorm = RMSNorm(self.dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.dim, config.rms_norm_eps)
        self.qk_norm, self.eps = config.gqa_qk_norm, config.rms_norm_eps
        self.dense = nn.Linear(self.heads * self.dim, config.hidden_size, bias=config.use_bias)

    def forward(self, x_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """[B, T, M] to [B, T, M]."""
        return self.dense(self.mix(x_BTM, call, cache))

    def mix(self, x_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """The input of `dense`, [B, T, H * D]."""
        qkv, norms = self.query_key_value(x_BTM), qk_norm_weights(self)
        q, k, v = split_norm_rope(qkv, norms, call.tables.head, heads=self.heads, kv_heads=self.kv_heads, eps=self.eps)
        if cache is not None:
            return cache.attend(q, k, v, self.dim**-0.5, call).flatten(2)
        out = softmax_attention(q, k, v, scale=self.dim**-0.5, cu_seqlens=call.cu_seqlens, key_mask=call.key_mask)
        return out.flatten(2)


class LightningAttention(nn.Module):
    """Linear attention with a fixed decay per head, QK-norm, RoPE, grouped output norm and a sigmoid gate.

    K and V have as many heads as Q. Rows of `query_key_value` are [Q | K | V], head-major. The decay is no parameter.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.dim = config.num_attention_heads, config.head_dim
        width = self.heads * self.dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=config.use_qkv_bias)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.dim, config.rms_norm_eps)
        self.qk_norm, self.silu, self.eps = config.use_qk_norm, config.linear_silu, config.rms_norm_eps
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.g_norm = GroupRMSNorm(width, config.group_norm_size, config.rms_norm_eps)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        self.decay_of = (self.heads, layer, config.num_hidden_layers, config.lightning_decay_offset)

    def forward(self, x_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """[B, T, M] to [B, T, M]."""
        return self.dense(self.mix(x_BTM, call, cache))

    def mix(self, x_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """The input of `dense`, [B, T, H * D]: normed, gated."""
        if cache is not None:
            return cache.recur(self, self.query_key_value(x_BTM), self.g_proj(x_BTM), call)
        return self.gated(self.kernel(x_BTM, call), self.g_proj(x_BTM))

    def kernel(self, x_BTM: Tensor, call: CallContext) -> Tensor:
        """The recurrence's own output without a cache, [B, T, H * D], before norm and gate."""
        q, k, v = self.split(self.query_key_value(x_BTM), call)
        return lightning(q, k, v, self.log_decay(x_BTM), cu_seqlens=call.cu_seqlens, return_state=False)[0].flatten(2)

    def split(self, qkv_BTX: Tensor, call: CallContext) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D] as the recurrence takes them; padding adds nothing to a state."""
        norms, heads = qk_norm_weights(self), self.heads
        q, k, v = split_norm_rope(qkv_BTX, norms, call.tables.head, heads=heads, kv_heads=heads, eps=self.eps, silu=self.silu)
        if call.key_mask is not None:
            v = v * call.key_mask[:, -v.shape[1] :, None, None].to(v.dtype)
        return q, k, v

    def gated(self, out_BTX: Tensor, gate_BTX: Tensor) -> Tensor:
        """Group norm and sigmoid gate."""
        return gated_group_norm(out_BTX, gate_BTX, self.g_norm.weight, self.g_norm.eps, self.g_norm.groups)

    def log_decay(self, like: Tensor) -> Tensor:
        """This layer's log-decay, FP32 [H], on the device of `like`."""
        return log_decay_on(like.device, *self.decay_of)


def qk_norm_weights(mixer: GroupedQueryAttention | LightningAttention) -> tuple[Tensor, Tensor] | None:
    """Weights [D] of the norms of queries and keys; None for a mixer without them."""
    return (mixer.query_layernorm.weight, mixer.key_layernorm.weight) if mixer.qk_norm else None


class LatentAttention(nn.Module):
    """Multi-head latent attention: K and V of all heads are read from one latent row per token, RoPE from a shared head.

    Cached per token: R latent values (after their norm) and r rotated ones. Few new tokens attend in absorbed form.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank and config.qk_nope_head_dim and config.qk_rope_head_dim and config.v_head_dim
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        width, rows = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, rows, bias=config.use_qkv_bias)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=config.use_qkv_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, rows, bias=False)
        self.low_rank_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=config.use_qkv_bias)
        self.kv_a_layernorm = RMSNorm(self.rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        bias = config.use_qkv_bias or config.use_bias
        self.dense = nn.Linear(self.heads * self.value, width, bias=bias)
        self.scale = config.qk_head_dim**-0.5
        scaling = config.rope_scaling or {}
        if scaling.get("mscale_all_dim"):
            self.scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2

    def forward(self, x_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """[B, T, M] to [B, T, M]."""
        return self.dense(self.mix(x_BTM, call, cache))

    def mix(self, x_BTM: Tensor, call: CallContext, cache: LayerMemory | None = None) -> Tensor:
        """The input of `dense`, [B, T, H * Dv]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTM))) if self.low_rank_query else self.q_proj(x_BTM)
        q = q.unflatten(-1, (self.heads, -1))
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTM).split((self.rank, self.rope), dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = apply_rope(k_rope.unsqueeze(2), *call.tables.latent, interleaved=True).squeeze(2)
        if cache is not None:
            return cache.attend_latents(self, q, latent, k_rope, call).flatten(2)
        return self.expanded(q, latent, k_rope, call).flatten(2)

    def read(self, q_BTHE: Tensor, latent_BSR: Tensor, k_rope_BSr: Tensor, call: CallContext) -> Tensor:
        """Attention of T new tokens over the latents of S, in the cheaper form; [B, T, H, Dv]."""
        new, total = q_BTHE.shape[1], latent_BSR.shape[1]
        if new < total and absorbed_is_cheaper(new, self.rank, self.nope, self.value):
            return self.absorbed(q_BTHE, latent_BSR, k_rope_BSr, call)
        return self.expanded(q_BTHE, latent_BSR, k_rope_BSr, call)

    def expanded(self, q_BTHE: Tensor, latent_BSR: Tensor, k_rope_BSr: Tensor, call: CallContext) -> Tensor:
        """Keys and values of every head made from the latents, then ordinary attention; [B, T, H, Dv]."""
        kv = self.kv_b_proj(latent_BSR).unflatten(-1, (self.heads, -1))
        q, k, v = latent_qkv(q_BTHE, kv, k_rope_BSr, call.tables.latent)
        return softmax_attention(q, k, v, scale=self.scale, cu_seqlens=call.cu_seqlens, key_mask=call.key_mask)

    def absorbed(self, q_BTHE: Tensor, latent_BSR: Tensor, k_rope_BSr: Tensor, call: CallContext) -> Tensor:
        """The same, read straight from the latents; [B, T, H, Dv]."""
        q_nope, q_rope = q_BTHE.split((self.nope, self.rope), dim=-1)
        q_rope = apply_rope(q_rope, *call.tables.latent, interleaved=True)
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        return absorbed_attention(
            q_nope, q_rope, latent_BSR, k_rope_BSr, weight, self.nope, scale=self.scale, key_mask=call.key_mask
        )


MIXERS: dict[str, type[GroupedQueryAttention] | type[LightningAttention] | type[LatentAttention]] = {
    "gqa": GroupedQueryAttention,
    "lightning": LightningAttention,
    "mla": LatentAttention,
}


# ---------------------------------------------------------------------------------------------------------------------
# Feed-forward
# ---------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] to [..., M]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class SparseMoE(nn.Module):
    """Routed experts plus, where the config has them, shared experts that see every token.

    In training `tokens_E` counts the tokens per expert (on their device) until somebody sets it to None: what an update of the
    router's bias needs. Activation checkpointing counts a layer's tokens twice. While `chosen` is a list it receives every call's
    experts [N, k], which RL replays; nothing is counted then.
    """

    tokens_E: Tensor | None
    chosen: list[Tensor] | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.num_shared_experts:
            self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size)
        self.has_shared = config.num_shared_experts > 0
        self.tokens_E = self.chosen = None

    def forward(self, x_BTM: Tensor) -> Tensor:
        """[B, T, M] to [B, T, M]."""
        out, counts_E = self.routed(x_BTM.flatten(0, 1))
        if self.training and counts_E is not None:
            self.tokens_E = counts_E if self.tokens_E is None else self.tokens_E + counts_E
        out = out.view_as(x_BTM)
        return out + self.shared_experts(x_BTM) if self.has_shared else out

    def routed(self, x_NM: Tensor) -> tuple[Tensor, Tensor | None]:
        """The routed experts' sum [N, M] and, in training, the tokens per expert [E]."""
        gate, experts = self.gate, self.experts
        if self.chosen is not None:
            weight_Nk, index_Nk = gate(x_NM)
            self.chosen.append(index_Nk)
            return experts(x_NM, weight_Nk, index_Nk), None
        if stream_kernels(x_NM)[0] is not None and experts.compute is swiglu_experts:
            weights = (gate.weight, gate.expert_bias, experts.gate_proj, experts.up_proj, experts.down_proj)
            return moe(x_NM, *weights, **gate.options())
        weight_Nk, index_Nk = gate(x_NM)
        counts_E = count_tokens(index_Nk, gate.weight.shape[0]) if self.training else None
        return experts(x_NM, weight_Nk, index_Nk), counts_E


class Router(nn.Module):
    """Scores in FP32; the bias only shifts which experts are chosen."""

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None)

    def options(self) -> dict[str, Any]:
        """How this router chooses: the keywords of `route`."""
        c = self.config
        return {
            "top_k": c.num_experts_per_tok,
            "n_group": c.n_group,
            "topk_group": c.topk_group,
            "score_function": c.score_function,
            "norm_topk_prob": c.norm_topk_prob,
            "scaling_factor": c.routed_scaling_factor,
        }

    def forward(self, x_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Weights FP32 [N, k] and expert indices [N, k]."""
        return route(x_NM, self.weight, self.expert_bias, **self.options())


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_proj and up_proj [E, F, M], down_proj [E, M, F].

    compute: what multiplies; training in FP8 puts `ops.fp8.fp8_experts` in its place.
    """

    compute: Callable[..., Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.compute = swiglu_experts
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [N, M]."""
        return self.compute(x_NM, weight_Nk, index_Nk, self.gate_proj, self.up_proj, self.down_proj)


# ---------------------------------------------------------------------------------------------------------------------
# Norms and positions
# ---------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """`rms_norm` with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """h + delta, and its norm."""
        return add_rms_norm(h, delta, self.weight, self.eps)


class GroupRMSNorm(RMSNorm):
    """`group_rms_norm` with a weight."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return group_rms_norm(x, self.weight, self.eps, self.groups)


class RopeTables:
    """cos and sin of one call: `head` for GQA and Lightning layers, `latent` for MLA layers."""

    def __init__(self, head: tuple[Tensor, Tensor], latent: tuple[Tensor, Tensor]) -> None:
        self.head = head
        self.latent = latent


class Rope(nn.Module):
    """Frequencies, computed from the config and never stored in a checkpoint: loading cannot leave them stale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._known: dict[tuple[int, torch.device], tuple[Tensor, float]] = {}

    def forward(self, input_ids: Tensor, start: int, cu_seqlens: Tensor | None) -> RopeTables:
        """Tables for tokens at positions start, start + 1, ...; positions restart in every packed document."""
        return self.at(consecutive_positions(input_ids, start, cu_seqlens))

    def at(self, positions_BT: Tensor) -> RopeTables:
        """Tables for tokens at these positions, [1 or B, T]."""
        c = self.config
        head = self._tables(positions_BT, c.rotary_dim)
        same = not c.qk_rope_head_dim or c.qk_rope_head_dim == c.rotary_dim
        return RopeTables(head, head if same else self._tables(positions_BT, c.qk_rope_head_dim or 0))

    def _tables(self, positions_BT: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
        inv_freq, factor = self._frequencies(rotary_dim, positions_BT.device)
        return rope_tables(positions_BT, inv_freq, factor)

    def _frequencies(self, rotary_dim: int, device: torch.device) -> tuple[Tensor, float]:
        """Computed once per device: a copy from the host at every call would make the GPU wait."""
        if (rotary_dim, device) not in self._known:
            with torch.inference_mode(False):
                inv_freq, factor = rope_frequencies(rotary_dim, self.config.rope_theta, self.config.rope_scaling)
                self._known[rotary_dim, device] = inv_freq.to(device), factor
        return self._known[rotary_dim, device]
