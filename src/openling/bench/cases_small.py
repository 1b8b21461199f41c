"""Small ops beside their plain compositions, eager and compiled, against the bytes they must move; losses from logits and states.

Two sizes: 8192 tokens of hidden size 2048, for which another kernel library gives times on an H800 (the goals in µs), and 32768
tokens of hidden size 8192. The small ones are measured in graphs, over several sets of inputs so that none is read from the L2.
Legend: N tokens, C channels, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.bench.case import Case, Floor, Goal
from openling.ops import fused, kernels
from openling.ops.loss import head_loss
from openling.ops.norm import rms_norm
from openling.ops.pick import plain_twins
from openling.ops.rope import rope_frequencies, rope_tables

EPS, THETA = 1e-6, 6e6
L2_BYTES = 60 * 2**20
# (sequences, tokens, heads of 128, groups of the output norm)
SMALL, LARGE = (1, 8192, 16, 4), (8, 4096, 64, 8)
FUSED = ("split + QK-norm + RoPE", "group RMSNorm * gate", "add + RMSNorm", "RMSNorm", "SwiGLU", "MLA q, k, v")
LOSSES = ("cross-entropy", "cross-entropy + KL", "LM head + cross-entropy")
OPS = (
    *(f"{name} {passes}" for name in FUSED for passes in ("forward", "forward + backward")),
    *(f"{x} forward + backward" for x in LOSSES),
)


@dataclass(frozen=True)
class Op:
    """An op at one shape: its call, its inputs, which of these have gradients, and bytes per pass."""

    name: str
    shape: str
    call: Callable[..., tuple[Tensor, ...] | Tensor]
    inputs: Callable[[], list[Tensor]]
    forward_bytes: int
    backward_bytes: int
    goals: tuple[Goal, Goal]  # forward, forward + backward
    differentiable: int


def cases(quick: bool) -> Iterator[Case]:
    """Every op forward and with its backward; unless quick, compiled compositions are the peers of three large ones as well."""
    torch.manual_seed(0)
    for size in (SMALL,) if quick else (SMALL, LARGE):
        for make in (split_op, gated_op, add_op, norm_op, swiglu_op, latent_op):
            yield from _cases(make(*size), compiled=False)
            if size == LARGE and make in (split_op, gated_op, add_op):
                yield from _cases(make(*size), compiled=True)
    yield from _loss_cases(quick)


def randn(*shape: int) -> Tensor:
    """BF16 on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _cases(op: Op, *, compiled: bool) -> Iterator[Case]:
    """Forward alone, and forward with backward."""
    sets = [op.inputs()]
    bytes_of_set = sum(x.nbytes for x in sets[0])
    sets += [op.inputs() for _ in range(min(7, 4 * L2_BYTES // bytes_of_set))]
    plain = torch.compile(op.call, dynamic=False) if compiled else op.call
    for backward in (False, True):
        yield Case(
            op=op.name + (" forward + backward" if backward else " forward"),
            shape=op.shape,
            ours=_runner(op, op.call, sets, backward),
            peer=_in_plain_twins(_runner(op, plain, sets, backward)),
            peer_name="composition, torch.compile" if compiled else "composition, eager",
            floor=Floor(bytes=op.forward_bytes + (op.backward_bytes if backward else 0)),
            goal=op.goals[backward],
            mode="graph" if op.forward_bytes < 2**29 else "eager",
        )


def _runner(op: Op, call: Callable[..., object], sets: list[list[Tensor]], backward: bool) -> Callable[[], object]:
    """A call on the next set of inputs; with random upstream gradients where it includes the backward pass."""
    turn = cycle(sets)
    with torch.no_grad(), plain_twins():
        outputs = op.call(*sets[0])
    upstream = [torch.randn_like(x) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def forward() -> object:
        with torch.no_grad():
            return call(*next(turn))

    def both() -> object:
        inputs = next(turn)
        out = call(*inputs)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), inputs[: op.differentiable], upstream)

    for inputs in sets:
        for x in inputs[: op.differentiable]:
            x.requires_grad_()
    return both if backward else forward


def _in_plain_twins(call: Callable[[], object]) -> Callable[[], object]:
    def plain() -> object:
        with plain_twins():
            return call()

    return plain


def split_op(batch: int, tokens: int, heads: int, groups: int) -> Op:
    """Split + QK-norm + RoPE of a Lightning layer, half of the dims rotated."""
    rows = batch * tokens * heads * 128 * 2
    tables = rope_tables(torch.arange(tokens, device="cuda")[None], rope_frequencies(64, THETA)[0].cuda(), 1.0)

    def call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        return fused.split_norm_rope(qkv, (q_weight, k_weight), tables, heads=heads, kv_heads=heads, eps=EPS)

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, 3 * heads * 128), randn(128), randn(128)]

    goals = (Goal(fraction=0.8, us=59), Goal(fraction=0.8, us=166)) if batch == 1 else (Goal(fraction=0.8),) * 2
    shape = f"{batch} x {tokens}, {heads} heads of 128, 64 rotated"
    # Forward q and k in and out; backward q, k and all three gradients in, one joint gradient out.
    return Op("split + QK-norm + RoPE", shape, call, inputs, 4 * rows, 8 * rows, goals, 3)


def gated_op(batch: int, tokens: int, heads: int, groups: int) -> Op:
    """The output norm of a Lightning layer and its gate."""
    width = heads * 128
    rows = batch * tokens * width * 2

    def call(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return fused.gated_group_norm(x, gate, weight, EPS, groups)

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, width), randn(batch, tokens, width), randn(width)]

    goals = (Goal(fraction=0.8, us=46.9), Goal(fraction=0.8, us=127.9)) if batch == 1 else (Goal(fraction=0.8),) * 2
    return Op(
        "group RMSNorm * gate", f"{batch} x {tokens} x {width}, {groups} groups", call, inputs, 3 * rows, 5 * rows, goals, 3
    )


def norm_op(batch: int, tokens: int, heads: int, groups: int) -> Op:
    """RMSNorm over the hidden size."""
    width = heads * 128
    rows = batch * tokens * width * 2

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, width), randn(width)]

    goals = (Goal(fraction=0.8),) * 2
    return Op("RMSNorm", f"{batch} x {tokens} x {width}", lambda x, w: rms_norm(x, w, EPS), inputs, 2 * rows, 3 * rows, goals, 2)


def add_op(batch: int, tokens: int, heads: int, groups: int) -> Op:
    """Residual add and RMSNorm."""
    width = heads * 128
    rows = batch * tokens * width * 2

    def call(h: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return fused.add_rms_norm(h, delta, weight, EPS)

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, width), randn(batch, tokens, width), randn(width)]

    goals = (Goal(fraction=0.8),) * 2
    return Op("add + RMSNorm", f"{batch} x {tokens} x {width}", call, inputs, 4 * rows, 4 * rows, goals, 3)


def swiglu_op(batch: int, tokens: int, heads: int, groups: int) -> Op:
    """SwiGLU at 2.75 times the hidden size, gate and up apart."""
    width = heads * 352
    rows = batch * tokens * width * 2

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, width), randn(batch, tokens, width)]

    goals = (Goal(fraction=0.8),) * 2
    return Op("SwiGLU", f"{batch} x {tokens} x {width}", fused.swiglu, inputs, 3 * rows, 5 * rows, goals, 2)


def latent_op(batch: int, tokens: int, heads: int, groups: int) -> Op:
    """MLA's q and k in expanded form: 128 + 64 dims, values of 128."""
    dims = batch * tokens * heads * 2
    tables = rope_tables(torch.arange(tokens, device="cuda")[None], rope_frequencies(64, THETA)[0].cuda(), 1.0)

    def call(q: Tensor, kv: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        return fused.latent_qkv(q, kv, shared, tables)

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, heads, 192), randn(batch, tokens, heads, 256), randn(batch, tokens, 64)]

    goals = (Goal(fraction=0.8),) * 2
    shape = f"{batch} x {tokens}, {heads} heads of 128 + 64, values of 128"
    # Forward q in and out, k's own dims in, k out; backward dq in and out, dk and dv in, dkv out.
    return Op("MLA q, k, v", shape, call, inputs, (2 * 192 + 128 + 192) * dims, (2 * 192 + 192 + 128 + 256) * dims, goals, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def _loss_cases(quick: bool) -> Iterator[Case]:
    tokens, vocabulary, width = 8192, 157184, 2048
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    yield logits_case(tokens, vocabulary, targets)
    if quick:
        return
    yield distillation_case(tokens // 2, vocabulary, targets[: tokens // 2])
    yield head_case(tokens, vocabulary, width)


def logits_case(tokens: int, vocabulary: int, targets: Tensor) -> Case:
    """Cross-entropy and its gradient in place of BF16 logits; the goal is another library's forward + backward on an H800."""
    logits = randn(tokens, vocabulary)

    def peer() -> object:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x.float(), targets), x)

    return Case(
        op="cross-entropy forward + backward",
        shape=f"{tokens} x {vocabulary} logits",
        ours=lambda: kernels.head_losses(logits, None, targets, 1.0, 0.0, False, True),
        peer=peer,
        peer_name="F.cross_entropy in FP32",
        floor=Floor(bytes=2 * tokens * vocabulary * 2),
        goal=Goal(ratio=3.4, us=2599),
        note="the floor counts one reading; a row does not fit on chip, so it is read twice",
    )


def distillation_case(tokens: int, vocabulary: int, targets: Tensor) -> Case:
    """Cross-entropy and KL to a teacher's logits with their gradient."""
    logits, teacher = randn(tokens, vocabulary), randn(tokens, vocabulary)

    def peer() -> object:
        x = logits.detach().requires_grad_()
        p, t = x.float().log_softmax(-1), teacher.float().log_softmax(-1)
        loss = F.nll_loss(p, targets) + F.kl_div(p, t, log_target=True, reduction="batchmean")
        return torch.autograd.grad(loss, x)

    return Case(
        op="cross-entropy + KL forward + backward",
        shape=f"{tokens} x {vocabulary} logits of both",
        ours=lambda: kernels.head_losses(logits, teacher, targets, 1.0, 1.0, False, True),
        peer=peer,
        peer_name="torch, FP32",
        floor=Floor(bytes=3 * tokens * vocabulary * 2),
        goal=Goal(ratio=3.4),
        note="the floor counts one reading of both",
    )


def head_case(tokens: int, vocabulary: int, width: int) -> Case:
    """The whole head: projection, loss, both gradients."""
    h, weight = (randn(1, tokens + 1, width) * 0.1).requires_grad_(), (randn(vocabulary, width) * 0.02).requires_grad_()
    ids = torch.randint(vocabulary, (1, tokens + 1), device="cuda")

    def ours() -> object:
        return torch.autograd.grad(head_loss(h, weight, ids).loss, (h, weight))

    def peer() -> object:
        logits = (h[:, :-1].flatten(0, 1) @ weight.T).float()
        return torch.autograd.grad(F.cross_entropy(logits, ids[:, 1:].flatten()), (h, weight))

    return Case(
        op="LM head + cross-entropy forward + backward",
        shape=f"{tokens} tokens of {width}, vocabulary {vocabulary}",
        ours=ours,
        peer=peer,
        peer_name="torch, FP32 logits",
        floor=Floor(bytes=4 * weight.nbytes, flops=6 * tokens * vocabulary * width),
        goal=Goal(ratio=1.0),
    )
