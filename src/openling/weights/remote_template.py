"""The Hugging Face side of an exported folder; `remote.py` appends this file to the model sources.

Only long-lived parts of transformers' API are used. `Experts` replaces the stacked one of the model file, so that every
parameter has the name it has in the checkpoint.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from openling.model.cache import Cache
from openling.model.config import ModelConfig, read_ling
from openling.model.ling import MLP, Backbone
from openling.ops.moe import combine_experts


def batch_invariant() -> bool:
    """Transformers' own products depend on the batch."""
    return False


def kernels_for(x: Tensor) -> ModuleType | None:
    """No kernels: exported code runs anywhere, in plain PyTorch only."""
    return None


class Experts(nn.ModuleList):
    """All routed experts of a layer, one module each."""

    def __init__(self, config: ModelConfig) -> None:
        plain = config.replace(mlp_bias=False)
        super().__init__(MLP(plain, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [N, M]."""
        return combine_experts(x_NM, weight_Nk, index_Nk, len(self), lambda expert, x: self[expert](x))


class OpenlingConfig(PretrainedConfig):
    """config.json as it is; `read_ling` gives its keys their meaning."""

    model_type = "bailing_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs: Any) -> None:
        # transformers 5 keeps all of RoPE in one dict, which `read_ling` reads as well.
        scaling = kwargs.pop("rope_scaling", None)
        if scaling and not kwargs.get("rope_parameters"):
            kwargs["rope_parameters"] = {"rope_theta": kwargs.get("rope_theta"), **scaling}
        super().__init__(**kwargs)


class OpenlingCache(Cache):
    """The hybrid cache with the few methods that `generate` calls."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.reorder(beam_idx)


def _packed_bounds(position_ids_BT: Tensor, seen: int) -> Tensor | None:
    """Where documents begin in all rows behind one another, and the end; None where each row goes on behind `seen` tokens."""
    columns_T = torch.arange(seen, seen + position_ids_BT.shape[1], device=position_ids_BT.device)
    if (position_ids_BT == columns_T).all():
        return None
    begins_BT = position_ids_BT == 0
    rises_BT = position_ids_BT[:, 1:] == position_ids_BT[:, :-1] + 1
    if seen or not begins_BT[:, 0].all() or not (rises_BT | begins_BT[:, 1:]).all():
        raise ValueError(
            f"position_ids: each row rises by one from {seen}, the tokens that are cached"
            + ("" if seen else ", and may begin again at 0 where another document does")
        )
    (starts_D,) = begins_BT.flatten().nonzero(as_tuple=True)
    return torch.cat([starts_D, starts_D.new_tensor([begins_BT.numel()])]).int()


def _check_padding(mask_BS: Tensor, position_ids: Tensor | None, new_BT: Tensor) -> None:
    """A `ValueError` where padding lies between a row's tokens, whose states it would enter, or positions contradict it."""
    if (mask_BS[:, 1:] & ~mask_BS[:, :-1]).sum(1).add(mask_BS[:, 0]).gt(1).any():
        raise ValueError(
            "attention_mask: padding may not lie between tokens of a row; to go on from a cache, pad prompts at the left"
        )
    if position_ids is not None:
        both_BT = new_BT[:, 1:] & new_BT[:, :-1]
        rises_BT = position_ids[:, 1:] == position_ids[:, :-1] + 1
        if not (rises_BT | ~both_BT).all():
            raise ValueError(
                "position_ids: with padding each row is one document, and rises by one; pack documents without padding"
            )


class BailingMoeV2_5ForCausalLM(PreTrainedModel, GenerationMixin):  # noqa: N801 (the architecture's published name)
    """Backbone and LM head under transformers' interface; MTP layers are loaded but not run."""

    config_class = OpenlingConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer", "MtpLayer"]
    _keep_in_fp32_modules_strict = ["expert_bias"]
    _supports_sdpa = True
    _is_stateful = True  # A Lightning state cannot be rolled back: `generate` then refuses assisted decoding.

    def __init__(self, config: OpenlingConfig) -> None:
        super().__init__(config)
        layers = read_ling(config.to_dict())
        self.model = Backbone(layers)
        self.lm_head = nn.Linear(layers.hidden_size, layers.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """FP32 logits [B, T, V] and, with labels [B, T] (-100 is ignored), the next-token loss.

        attention_mask [B, S] covers cached and new tokens; 0 marks padding, on either side of a row's tokens. position_ids [B, T]
        that begin again at 0 mark packed documents, which do not see one another (no padding then, and nothing is cached);
        what else does not rise by one is refused. logits_to_keep: only the last so many positions, or those of these indices.
        """
        if output_attentions:
            raise ValueError("output_attentions: Lightning layers have no attention matrices, and none are returned")
        if any(kwargs.pop(name, None) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
            raise ValueError("cu_seq_lens, seq_idx: packed documents are marked by position_ids that begin again at 0 alone")
        cache = self._cache(past_key_values, use_cache)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"attention_mask: [batch, tokens] with 0 for padding, got {attention_mask.dim()} dimensions")
            new = attention_mask[:, -input_ids.shape[1] :]
            if padded:
                _check_padding(attention_mask.bool(), position_ids, new.bool())
            attention_mask = None if new.all() else new
        bounds = None
        if position_ids is not None and not padded:
            bounds = _packed_bounds(position_ids.expand(input_ids.shape), cache.get_seq_length() if cache is not None else 0)
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        if bounds is None:
            h_BTM = self.model(input_ids, cache=cache, attention_mask=attention_mask, hidden_states=hidden)
        else:
            cache, shape = None, (*input_ids.shape, -1)
            h_BTM = self.model(input_ids.reshape(1, -1), cu_seqlens=bounds, hidden_states=hidden).view(shape)
            hidden = None if hidden is None else [h.view(shape) for h in hidden]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h_BTM[:, kept])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        states = tuple(hidden) if hidden is not None else None
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)
        return out.to_tuple() if return_dict is False else out

    def _cache(self, given: Any, use_cache: bool | None) -> OpenlingCache | None:
        """Our cache: the one given, or a new one in place of an empty foreign one."""
        if isinstance(given, OpenlingCache):
            return given
        if given is not None and given.get_seq_length():
            raise ValueError(f"past_key_values must come from this model, got a filled {type(given).__name__}")
        wanted = use_cache if use_cache is not None else getattr(self.config, "use_cache", True) and not self.training
        return OpenlingCache(self.config.num_hidden_layers) if wanted or given is not None else None

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Only the tokens that the cache has not seen."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if seen >= input_ids.shape[1]:
            raise ValueError(f"past_key_values holds {seen} tokens, all that are given: nothing is left to go on with")
        passed_on = {key: kwargs[key] for key in ("use_cache", "output_hidden_states", "logits_to_keep") if key in kwargs}
        new = {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, "past_key_values": past_key_values}
        return new | passed_on

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`forward` makes its own cache."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the LM head."""
        self.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Normal matrices, unit norms, zero biases; what was loaded is left alone."""
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            with torch.no_grad():
                if name == "bias":
                    parameter.zero_()
                elif parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, getattr(self.config, "initializer_range", 0.02))
