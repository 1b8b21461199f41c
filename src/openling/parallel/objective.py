"""Next-token cross-entropy of a part of a batch, over split rows and words, as its share of the mean over all ranks' tokens.

Every rank adds up the losses of its own tokens and divides by the count of all of them; gradients are summed over ranks. So the
step does not depend on how many tokens a rank has. With tensor ranks each has V / P words of the head: of a token's softmax the
largest logit, the sum of exponentials and the target's logit go through all-reduces of [C], never the logits themselves.

Legend: N tokens, C of a chunk, M hidden size, V words of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openling.model.ling import Ling
from openling.parallel.collectives import copy
from openling.parallel.context import NO_TARGET, Part

# Values of one chunk's logits.
CHUNK_VALUES = 2**24


@dataclass(frozen=True)
class Losses:
    """`loss`: this rank's share, to call backward on. `sums`: of next-token losses, then of each MTP layer's, detached."""

    loss: Tensor
    sums: Tensor


def counts(model: Ling, part: Part) -> Tensor:
    """How many tokens of this part have a target: of the next-token loss, then of each MTP layer."""
    aheads = range(1, 2 + len(model.model.mtp_layers()))
    return torch.stack([(part.targets(ahead) != NO_TARGET).sum() for ahead in aheads])


def objective(
    model: Ling,
    part: Part,
    counts: Tensor,
    *,
    mtp_weight: float = 0.0,
    tensor_group: dist.ProcessGroup | None = None,
) -> Losses:
    """Mean next-token loss plus `mtp_weight` times the mean over MTP layers of theirs.

    counts: `counts` summed over all parts of the step: those of other ranks and those of accumulated gradients.
    """
    memory = part.memory
    head = model.lm_head.weight
    h = model.model(part.ids(), cache=memory)
    sums = [loss_sum(h, head, part.targets(1), tensor_group)]
    layers = model.model.mtp_layers() if mtp_weight else []
    for k, layer in enumerate(layers, 1):
        ids = part.ids(k)
        tables = model.model.rope(ids, 0, None) if memory is None else model.model.rope.at(memory.positions(ids, None))
        h = layer(h, model.model.word_embeddings(ids), tables, None if memory is None else memory.layers[0])
        sums.append(loss_sum(h, head, part.targets(k + 1), tensor_group))
    weights = [1.0, *(mtp_weight / len(layers) for _ in layers)]
    shares = [w * s / n for w, s, n in zip(weights, sums, counts.clamp(min=1), strict=False)]
    return Losses(torch.stack(shares).sum(), torch.stack(sums).detach())


def loss_sum(h_BTM: Tensor, weight_VM: Tensor, targets_BT: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of -log p(target) over tokens with a target; group: the ranks that hold the other words."""
    h_NM = h_BTM.flatten(0, 1)
    if group is not None:
        h_NM = copy(h_NM, group)
    device = h_NM.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_NM.dtype
    wanted = torch.is_grad_enabled() and (h_NM.requires_grad or weight_VM.requires_grad)
    return _LossSum.apply(h_NM, weight_VM, targets_BT.flatten(), group, dtype, wanted)


class _LossSum(torch.autograd.Function):
    """Both gradients are formed from each chunk's logits in forward, as in `ops.loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        h_NM: Tensor,
        weight_VM: Tensor,
        target_N: Tensor,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        wanted: bool,
    ) -> Tensor:
        h, weight = h_NM.to(dtype), weight_VM.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        grad_h = torch.zeros_like(h) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted else None
        out = torch.zeros((), dtype=wide, device=h.device)
        step = max(1, CHUNK_VALUES // weight.shape[0])
        with torch.autocast(h.device.type, enabled=False):
            for rows in (slice(i, i + step) for i in range(0, h.shape[0], step)):
                p_CV, loss_C, hit_C, local_C = _chunk((h[rows] @ weight.T).to(wide), target_N[rows], first, group)
                known_C = target_N[rows] != NO_TARGET
                out += loss_C[known_C].sum()
                if grad_h is not None and grad_weight is not None:
                    p_CV.scatter_add_(-1, local_C[:, None], -hit_C.to(wide)[:, None])
                    grad = p_CV.mul_(known_C[:, None]).to(dtype)
                    grad_h[rows] = grad @ weight
                    grad_weight += grad.T @ h[rows]
        ctx.save_for_backward(
            None if grad_h is None else grad_h.to(h_NM.dtype), None if grad_weight is None else grad_weight.to(weight_VM.dtype)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if saved is None else saved * grads[0] for saved in ctx.saved_tensors), None, None, None, None


def _chunk(x_CV: Tensor, target_C: Tensor, first: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over all ranks' words, losses, whether the target is among this rank's words, and its place there."""
    local_C = target_C - first
    hit_C = (local_C >= 0) & (local_C < x_CV.shape[1])
    local_C = local_C.where(hit_C, local_C.new_zeros(()))
    top_C = x_CV.amax(-1)
    if group is not None:
        dist.all_reduce(top_C, dist.ReduceOp.MAX, group=group)
    target_logit_C = x_CV.gather(-1, local_C[:, None])[:, 0].masked_fill(~hit_C, 0)
    p_CV = (x_CV - top_C[:, None]).exp_()
    both_2C = torch.stack((p_CV.sum(-1), target_logit_C))
    if group is not None:
        dist.all_reduce(both_2C, group=group)
    return p_CV.div_(both_2C[0, :, None]), both_2C[0].log() + top_C - both_2C[1], hit_C, local_C
