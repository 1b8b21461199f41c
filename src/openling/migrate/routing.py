"""Router drift: how differently the experts of a MoE layer are chosen once the attention before them has changed.

Routers are frozen in a migration, but what they read is not: a student's tokens may go to other experts than its teacher's.
Legend: B windows, T tokens of a window, N tokens, E experts, k experts per token, M hidden size.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from openling.model.ling import Layer, Router, SparseMoE


class RouterDrift(TypedDict):
    """One layer's router in the student against the teacher's, each on its own model's stream; shares are of all tokens.

    changed: tokens whose set of experts is another one. kept: the teacher's choices that the student makes too.
    kl: KL(teacher || student) of the scores before the selection bias, normalised to a sum of 1, in nats.
    """

    layer: int
    changed: float
    kept: float
    kl: float


class RouterSums:
    """Adds up one layer's drift over batches."""

    def __init__(self) -> None:
        self.sums, self.tokens, self.per_token = torch.zeros(3, dtype=torch.float64), 0, 1

    def add(self, teacher: tuple[Layer, Tensor, Tensor], student: tuple[Layer, Tensor, Tensor]) -> None:
        """Each: the layer, the stream it reads [B, T, M], and its attention block's output."""
        (old, old_NE), (new, new_NE) = (_chosen(*side) for side in (teacher, student))
        shared = (old & new).sum(-1).double()
        self.per_token = int(old[0].sum())
        differs = (shared < self.per_token).double()
        kl = (old_NE.exp() * (old_NE - new_NE)).sum(-1)
        self.sums += torch.stack((differs.sum(), shared.sum(), kl.sum())).cpu()
        self.tokens += len(old)

    def result(self, layer: int) -> RouterDrift:
        """The means."""
        changed, shared, kl = (self.sums / self.tokens).tolist()
        return RouterDrift(layer=layer, changed=changed, kept=shared / self.per_token, kl=kl)


def _chosen(layer: Layer, h_BTM: Tensor, mixed_BTM: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to, as a mask [N, E], and the logarithms of its normalised scores [N, E], FP64."""
    assert isinstance(layer.mlp, SparseMoE)
    router: Router = layer.mlp.gate
    x_NM = layer.post_attention_layernorm.add(h_BTM, mixed_BTM)[1].flatten(0, 1)
    index_Nk = router(x_NM)[1]
    with torch.autocast(x_NM.device.type, enabled=False):
        logits = x_NM.double() @ router.weight.double().T
    scores = logits if router.config.score_function == "softmax" else torch.nn.functional.logsigmoid(logits)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, index_Nk, True), scores.log_softmax(-1)
