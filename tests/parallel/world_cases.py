"""A tiny hybrid with every kind of layer, batches, and the one-rank reference that every mesh must equal.

The reference runs the plain model over one document at a time, with logits and cross-entropy of PyTorch, in FP64.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.config.train import TrainConfig
from openling.data.batches import NO_TARGET, PackedBatch
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.parallel.apply import Parallel
from openling.parallel.pieces import Piece, pieces

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    layer_kinds=("lightning", "gqa", "lightning", "mla"),
    group_norm_size=4,
    kv_lora_rank=8,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    partial_rotary_factor=0.5,
    moe_layers=(1, 2, 3),
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=8,
    moe_router_enable_expert_bias=True,
    routed_scaling_factor=2.5,
    gqa_qk_norm=True,
    num_nextn_predict_layers=1,
)
# Biases, tied embeddings, fewer key/value heads, no experts, no low-rank query.
DENSE = CONFIG.replace(
    moe_layers=(),
    num_experts=0,
    num_shared_experts=0,
    n_group=1,
    topk_group=1,
    num_key_value_heads=2,
    use_qkv_bias=True,
    use_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    gqa_qk_norm=False,
    q_lora_rank=None,
)
MTP_WEIGHT = 0.1
# What `objective` reads of a run's configuration.
LOSSES = TrainConfig(steps=1, mtp=MTP_WEIGHT)


def model_of(config: ModelConfig) -> Ling:
    """The same random FP64 model in every process."""
    generator = torch.Generator().manual_seed(7)
    model = Ling(config).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            is_norm = tensor.dim() == 1 and name.endswith("norm.weight")
            tensor.copy_(1 + 0.1 * noise if is_norm else 0.3 * noise)
    return model.train()


def altered() -> Ling:
    """The model with other weights, for checkpoints to be read into."""
    model = model_of(CONFIG)
    for p in model.parameters():
        p.data.add_(1)
    return model


def held_pieces(parallel: Parallel) -> dict[str, Tensor]:
    """This rank's parameters as a checkpoint has them."""
    held = parallel.held(dict(parallel.model.named_parameters()))
    return pieces(parallel, {f"model/{name}": p.detach() for name, p in held.items()})


@dataclass(frozen=True)
class Batch:
    """Rows of one data rank, [B, S], and their documents where they are packed."""

    rows: Tensor
    documents: list[int] | None

    @property
    def texts(self) -> list[Tensor]:
        """Every document as a row."""
        if self.documents is None:
            return list(self.rows.split(1))
        return [self.rows[:, a:b] for a, b in zip(self.documents, self.documents[1:], strict=False)]

    @property
    def packed(self) -> PackedBatch:
        """As the training loop reads them."""
        count, tokens = self.rows.shape
        bounds = torch.tensor(self.documents or range(0, count * tokens + 1, tokens))
        targets = torch.cat((self.rows.flatten()[1:], torch.zeros(1, dtype=torch.long)))
        targets[bounds[1:] - 1] = NO_TARGET
        return PackedBatch(self.rows, targets.view_as(self.rows), bounds.int())


def batches(data_ranks: int, *, packed: bool, seed: int) -> list[Batch]:
    """What each data rank trains on: other tokens, lengths that nothing divides, in packed rows documents that end anywhere."""
    draw = random.Random(seed)
    out = []
    for _ in range(data_ranks):
        tokens = draw.choice((19, 23)) if packed else 13
        rows = torch.tensor([[draw.randrange(48) for _ in range(tokens)] for _ in range(1 if packed else 2)])
        ends = sorted({draw.randrange(1, tokens) for _ in range(3)})
        out.append(Batch(rows, [0, *ends, tokens] if packed else None))
    return out


def reference_loss(model: Ling, everything: list[Batch]) -> Tensor:
    """Mean next-token loss over all documents and MTP_WEIGHT times that of the MTP layer."""
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(2)], [0, 0]
    for text in (text for batch in everything for text in batch.texts):
        h = model.model(text)
        ahead = [model.logits(h), *model.mtp_logits(text, h)]
        for k, logits in enumerate(ahead):
            wanted = text[0, k + 1 :]
            sums[k] = sums[k] + F.cross_entropy(logits[0, : len(wanted)], wanted, reduction="sum") if len(wanted) else sums[k]
            counts[k] += len(wanted)
    return sums[0] / counts[0] + MTP_WEIGHT * sums[1] / counts[1]


def worst(parallel: Parallel, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any tensor of this rank from its part of the whole, relative to the whole's largest value."""
    differences = [0.0]
    for key, held in pieces(parallel, {f"/{name}": tensor for name, tensor in found.items()}).items():
        name, whole = key[1:], wanted[key[1:]]
        assert held.shape == whole.shape, name
        blocks = held.blocks() if isinstance(held, Piece) else [(None, held)]
        scale = whole.abs().max().clamp(min=1e-300)
        for chunk, view in blocks:
            part = (
                whole if chunk is None else whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))]
            )
            if part.numel():
                differences.append(float((view - part).abs().max() / scale))
            assert differences[-1] < 1e-10, f"{name} differs by {differences[-1]:.1e}"
    return max(differences)
