"""Next-token cross-entropy and KL(teacher || student) straight from hidden states, memory-bounded.

Logits [tokens, vocabulary] exist only for one chunk of tokens at a time. The gradient is formed in the same pass, from the
same logits: the student's projection runs once (a checkpointed chunk would run it twice), and backward only scales.
Where kernels run, the projection's half-precision logits are never widened in memory: softmax and logarithms are FP32 in
registers, and the gradient takes the logits' place.

    ce = -log p(next token)         d ce / d logits = p - onehot
    kl = sum_v t_v (log t_v - log p_v)   d kl / d logits = p - t        p student's, t teacher's distribution
    z = lse^2, lse = log sum_v exp logits_v   d z / d logits = 2 lse p

With the words of the head split over the ranks of a group, each has the logits of its own: of a token's softmax the largest
logit, the sum of exponentials and the target's logit are exchanged, never the logits.

Legend: B batch, T tokens, M hidden size, V vocabulary, N predicting tokens, B (T - 1) of whole rows, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openling.ops.pick import kernels_for

# Values of one chunk's logits, one copy each of the student's and the teacher's. Smaller chunks reread the head too often.
CHUNK_VALUES = 2**24
# On a CPU a chunk is widened to FP32 and worked on a few tokens at a time, whose values stay in the core's cache.
CACHED_VALUES = 2**18
# The plain form on a GPU, for z and for split words: it widens a chunk to FP32 a few times over, 512 MiB each.
GPU_CHUNK_VALUES = 2**27
# With kernels 2 GiB of BF16, one copy each of the student's and the teacher's: matrix products of thousands of tokens.
KERNEL_CHUNK_VALUES = 2**30


@dataclass(frozen=True)
class HeadLoss:
    """`loss` = ce_weight * ce + kl_weight * kl + z_weight * z, differentiable; the others are means per token, detached.

    `kl` and `agreement` (share of tokens where student and teacher have the same likeliest token) need a teacher; `z`, the mean
    square of the log-sum-exp of the logits, a weight.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None
    z: Tensor | None = None


def head_loss(
    h_BTM: Tensor,
    weight_VM: Tensor,
    input_ids_BT: Tensor,
    *,
    teacher_h_BTM: Tensor | None = None,
    teacher_weight_VM: Tensor | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    agreement: bool = False,
    chunk_values: int | None = None,
) -> HeadLoss:
    """Losses of the tokens that predict a next one, from outputs of the final norm [B, T, M] and LM heads [V, M].

    Projections run in the autocast dtype where autocast is on, else in h's dtype; softmax and logarithms in FP32 (FP64 for
    FP64 inputs). Gradients go to h and to weight where these need them; the teacher gets none. `chunk_values` bounds the
    values of a chunk's logits.
    """
    teacher = None
    if teacher_h_BTM is not None:
        assert teacher_weight_VM is not None
        teacher = (teacher_h_BTM[:, :-1].flatten(0, 1), teacher_weight_VM)
    return target_loss(
        h_BTM[:, :-1].flatten(0, 1),
        weight_VM,
        input_ids_BT[:, 1:].flatten(),
        teacher=teacher,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        agreement=agreement,
        chunk_values=chunk_values,
    )


def target_loss(
    h_NM: Tensor,
    weight_VM: Tensor,
    target_N: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    z_weight: float = 0.0,
    agreement: bool = False,
    denominator: int | None = None,
    chunk_values: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> HeadLoss:
    """`head_loss` of N tokens that all have a target; `teacher` is its hidden rows [N, M] and head.

    denominator: by what sums over tokens are divided, where other calls hold more of the mean's tokens; N by default. With a
    weight for z the plain form runs on a GPU too, which widens a chunk of logits at a time. group: the ranks that hold the words,
    rank r the r-th of equal parts, of both heads; all call it with the same N, and the gradient of h is this rank's term of a
    sum over them. `agreement` is not to be had then.
    """
    assert group is None or not agreement
    device = h_NM.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_NM.dtype
    if teacher is not None:
        teacher = (teacher[0].detach(), teacher[1].detach())
    count = max(1, target_N.numel()) if denominator is None else denominator
    call = _Call(target_N, teacher, ce_weight, kl_weight, z_weight, agreement, dtype, chunk_values, count, group)
    call.grad_h = torch.is_grad_enabled() and h_NM.requires_grad
    call.grad_weight = torch.is_grad_enabled() and weight_VM.requires_grad
    loss = _HeadLoss.apply(h_NM, weight_VM, call)
    ce, kl, same, z = call.sums / count
    return HeadLoss(loss, ce, kl if teacher else None, same if teacher and agreement else None, z if z_weight else None)


@dataclass
class _Call:
    """What one call of the loss carries besides the two differentiable inputs, and its sums: ce, kl, same top-1, z."""

    targets: Tensor
    teacher: tuple[Tensor, Tensor] | None
    ce_weight: float
    kl_weight: float
    z_weight: float
    agreement: bool
    dtype: torch.dtype
    chunk_values: int | None
    denominator: int
    group: dist.ProcessGroup | None = None
    grad_h: bool = False
    grad_weight: bool = False

    def __post_init__(self) -> None:
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.sums = torch.zeros(4, dtype=self.wide, device=self.targets.device)

    def kernels(self, h: Tensor) -> ModuleType | None:
        """The kernels where they serve: they know nothing of z and of other ranks' words."""
        return None if self.z_weight or self.group is not None else kernels_for(h)

    def rows(self, h_NM: Tensor, vocabulary: int) -> list[slice]:
        """The tokens of each chunk. Kernels get chunks of equal size in whole tiles of a matrix product."""
        count, fast = h_NM.shape[0], self.kernels(h_NM)
        usual = KERNEL_CHUNK_VALUES if fast is not None else GPU_CHUNK_VALUES if h_NM.is_cuda else CHUNK_VALUES
        size = max(1, (self.chunk_values or usual) // vocabulary)
        if fast is not None and count:
            size = -(-count // -(-count // size))
            size = -(-size // 256) * 256
        return [slice(i, i + size) for i in range(0, count, size)]

    def chunk(self, h_CM: Tensor, weight_VM: Tensor, teacher: tuple[Tensor, Tensor] | None, targets_C: Tensor) -> Tensor | None:
        """Add a chunk to the sums; returns d (sum of losses) / d logits [C, V] in the compute dtype where it is needed."""
        fast, gradient = self.kernels(h_CM), self.grad_h or self.grad_weight
        logits = h_CM @ weight_VM.T
        t_logits = None if teacher is None else teacher[0] @ teacher[1].T
        if fast is not None:
            weights = (self.ce_weight, self.kl_weight)
            self.sums[:3] += fast.head_losses(logits, t_logits, targets_C, *weights, self.agreement, gradient).sum(0)
            return logits if gradient else None
        size = logits.shape[0] if logits.is_cuda else max(1, CACHED_VALUES // logits.shape[1])
        for rows in (slice(i, i + size) for i in range(0, logits.shape[0], size)):
            self.few(logits[rows], None if t_logits is None else t_logits[rows], targets_C[rows, None], gradient)
        return logits if gradient else None

    def few(self, logits_CV: Tensor, t_logits_CV: Tensor | None, targets_C1: Tensor, gradient: bool) -> None:
        """Add a few tokens to the sums, and turn their logits into the gradient of (sum of losses) where it is needed."""
        x = logits_CV.to(self.wide)
        places_C1, here_C1 = self.placed(targets_C1, x.shape[1])
        hit_C1 = self.total(x.gather(-1, places_C1).masked_fill_(~here_C1, 0))
        p, lse = self.softmax(x)
        self.sums[0] += (lse - hit_C1).sum()
        t = None
        if t_logits_CV is not None:
            y = t_logits_CV.to(self.wide)
            t, t_lse = self.softmax(y)
            if self.agreement:
                self.sums[2] += (y.argmax(-1) == x.argmax(-1)).sum()
            # sum_v t = 1, so the two log-sum-exps leave the sum; equal logits give exactly 0.
            self.sums[1] += self.total(torch.linalg.vecdot(t, y - x).sum()) + (lse - t_lse).sum()
        if self.z_weight:
            self.sums[3] += lse.square().sum()
        if not gradient:
            return
        share = self.ce_weight + (self.kl_weight if t is not None else 0.0)
        grad = p.mul_(share + 2 * self.z_weight * lse if self.z_weight else share)
        grad.scatter_add_(-1, places_C1, -self.ce_weight * here_C1.to(self.wide))
        if t is not None and self.kl_weight:
            grad.sub_(t, alpha=self.kl_weight)
        logits_CV.copy_(grad)

    def placed(self, targets_C1: Tensor, words: int) -> tuple[Tensor, Tensor]:
        """Where targets stand among this rank's words, and whether they do: the place of one that does not is 0."""
        first = 0 if self.group is None else dist.get_rank(self.group) * words
        local_C1 = targets_C1 - first
        here_C1 = (local_C1 >= 0) & (local_C1 < words)
        return local_C1.where(here_C1, local_C1.new_zeros(())), here_C1

    def softmax(self, x_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over all words, of which this rank has V, and log-sum-exp [C, 1] of every row: one pass of exponentials."""
        top = x_CV.amax(-1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        weight = (x_CV - top).exp_()
        total = self.total(weight.sum(-1, keepdim=True))
        return weight.div_(total), total.log().add_(top)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks that hold words."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


class _HeadLoss(torch.autograd.Function):
    """The mean loss over N tokens; both gradients are ready when forward returns."""

    @staticmethod
    def forward(ctx: Any, h_NM: Tensor, weight_VM: Tensor, call: _Call) -> Tensor:
        h, weight = h_NM.to(call.dtype), weight_VM.to(call.dtype)
        teacher = None if call.teacher is None else tuple(x.to(call.dtype) for x in call.teacher)
        count = call.denominator
        grad_h = torch.empty_like(h) if call.grad_h else None
        grad_weight = torch.zeros_like(weight, dtype=call.wide) if call.grad_weight else None
        with torch.autocast(h.device.type, enabled=False):
            for rows in call.rows(h, weight.shape[0]):
                chunk_teacher = None if teacher is None else (teacher[0][rows], teacher[1])
                grad = call.chunk(h[rows], weight, chunk_teacher, call.targets[rows])
                if grad is not None and grad_h is not None:
                    grad_h[rows] = grad @ weight
                if grad is not None and grad_weight is not None:
                    grad_weight += grad.T @ h[rows]
        ctx.save_for_backward(
            None if grad_h is None else grad_h.div_(count).to(h_NM.dtype),
            None if grad_weight is None else grad_weight.div_(count).to(weight_VM.dtype),
        )
        loss = call.ce_weight * call.sums[0]
        if teacher is not None:
            loss = loss + call.kl_weight * call.sums[1]
        if call.z_weight:
            loss = loss + call.z_weight * call.sums[3]
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None
