"""What a migrated model lost against its teacher, and what it gained: loss and agreement, error per layer, recall, decoding
memory and speed, samples. Losses and divergences are means per token in nats. Every result is a plain dict, ready for JSON.

Memory is bounded: logits exist for one window's chunk of tokens at a time, residual streams for one batch of windows.
Legend: N windows, T tokens of a window, B windows of a batch, M hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from openling.data.needle import make_needle
from openling.errors import UserError
from openling.migrate.calibrate import relative, walk
from openling.migrate.routing import RouterDrift, RouterSums
from openling.model.cache import Cache
from openling.model.count import kv_bytes_per_token, state_bytes_per_sequence
from openling.model.generate import Sampling, generate, stop_ids
from openling.model.ling import Ling, SparseMoE
from openling.ops.loss import head_loss
from openling.train.metrics import memory_bytes

# Tokens of one forward pass (windows of a batch x their length).
BATCH_TOKENS = 4096


class Agreement(TypedDict):
    """Student against teacher on one text. Standard errors are over windows, since tokens of one window are not independent.

    `gap` = loss - teacher_loss; its error is that of the paired difference. `top1`: share of tokens with the same likeliest
    next token. `kl`: KL(teacher || student). `tokens`: predictions that were scored, N (T - 1).
    """

    loss: float
    loss_stderr: float
    perplexity: float
    teacher_loss: float
    gap: float
    gap_stderr: float
    kl: float
    top1: float
    tokens: int


class LayerError(TypedDict):
    """|student - teacher|^2 / |teacher|^2 of one attention block's output, over all tokens.

    `local`: both blocks read the teacher's stream. `propagated`: each reads its own model's.
    """

    layer: int
    kind: str
    local: float
    propagated: float


@dataclass(frozen=True)
class LayerMeasures:
    """What one walk of teacher and student through the layers finds; `routers` holds the MoE layers only."""

    errors: list[LayerError]
    routers: list[RouterDrift]


class DepthRecall(TypedDict):
    """Recall with the fact at one depth, a share of the text before it."""

    depth: float
    exact: float
    token_accuracy: float
    n: int


class Recall(TypedDict):
    """Needle recall at one length: share of answers right in full (`exact`), of answer tokens right, cases; and by depth."""

    length: int
    exact: float
    token_accuracy: float
    n: int
    depths: list[DepthRecall]


class DecodeRow(TypedDict):
    """Decoding one sequence at one context. `cache_bytes` are counted in the cache, `formula_bytes` follow from the config.

    `peak_bytes`: most device memory ever allocated on a GPU; on a CPU the whole process's resident memory afterwards.
    """

    context: int
    cache_bytes: int
    formula_bytes: int
    ms_per_token: float
    peak_bytes: int


class Sample(TypedDict):
    """A prompt and its greedy continuation."""

    prompt: str
    completion: str


def _batches(windows_NT: Tensor) -> Iterator[Tensor]:
    yield from windows_NT.split(max(1, BATCH_TOKENS // windows_NT.shape[1]))


def _hidden(model: Ling, windows_NT: Tensor, bf16: bool) -> Iterator[Tensor]:
    """Outputs of the final norm, batch by batch, [B, T, M] in the dtype of the LM head."""
    device = model.lm_head.weight.device
    for ids in _batches(windows_NT):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            h = model.model(ids.to(device))
        yield h.to(model.lm_head.weight.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and agreement
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherTrace:
    """The teacher on some windows, kept so that it need not run again after each stage: final hidden states, head, losses.

    hidden: one [B, T, M] per batch. head: [V, M]. loss: the mean of each window, FP64 [N].
    """

    hidden: list[Tensor]
    head: Tensor
    loss: Tensor

    @classmethod
    @torch.inference_mode()
    def record(cls, teacher: Ling, windows_NT: Tensor, *, bf16: bool = False) -> TeacherTrace:
        """Run the teacher once."""
        kept: list[Tensor] = []
        losses: list[Tensor] = []
        head = teacher.lm_head.weight.detach()
        for ids, h in zip(_batches(windows_NT), _hidden(teacher, windows_NT, bf16), strict=True):
            kept.append(h)
            with torch.autocast(h.device.type, torch.bfloat16, enabled=bf16):
                losses += [
                    head_loss(row[None].to(head.dtype), head, one[None]).ce for row, one in zip(h, ids.to(h.device), strict=True)
                ]
        return cls(kept, head, torch.stack(losses).double().cpu())


@torch.inference_mode()
def agreement(student: Ling, teacher: Ling | TeacherTrace, windows_NT: Tensor, *, bf16: bool = False) -> Agreement:
    """Loss of the student on token windows [N, T] and its divergence from the teacher; see `Agreement`.

    bf16: matrix products of backbones and heads run in BF16 autocast; softmax, logarithms and sums do not. It moves a loss by
    about 1e-3 and keeps the KL of near-equal models from falling below about that.
    """
    trace = teacher if isinstance(teacher, TeacherTrace) else TeacherTrace.record(teacher, windows_NT, bf16=bf16)
    head = student.lm_head.weight
    rows: list[Tensor] = []
    for ids, h, teacher_h in zip(_batches(windows_NT), _hidden(student, windows_NT, bf16), trace.hidden, strict=True):
        for one, student_row, teacher_row in zip(ids.to(h.device), h, teacher_h, strict=True):
            target = {"teacher_h_BTM": teacher_row[None].to(h.device), "teacher_weight_VM": trace.head.to(h.device)}
            with torch.autocast(h.device.type, torch.bfloat16, enabled=bf16):
                found = head_loss(student_row[None], head, one[None], **target, agreement=True)
            assert found.kl is not None and found.agreement is not None
            rows.append(torch.stack((found.ce, found.kl, found.agreement)).double().cpu())
    ce_N, kl_N, top1_N = torch.stack(rows).unbind(-1)
    return _summary(ce_N, kl_N, top1_N, trace.loss, tokens=windows_NT.shape[0] * (windows_NT.shape[1] - 1))


def _summary(ce_N: Tensor, kl_N: Tensor, top1_N: Tensor, teacher_N: Tensor, *, tokens: int) -> Agreement:
    loss = float(ce_N.mean())
    return Agreement(
        loss=loss,
        loss_stderr=_stderr(ce_N),
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        teacher_loss=float(teacher_N.mean()),
        gap=float((ce_N - teacher_N).mean()),
        gap_stderr=_stderr(ce_N - teacher_N),
        kl=float(kl_N.mean()),
        top1=float(top1_N.mean()),
        tokens=tokens,
    )


def _stderr(value_N: Tensor) -> float:
    """Standard error of the mean; 0 for a single window, where it cannot be known."""
    return float(value_N.std() / math.sqrt(len(value_N))) if len(value_N) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def layer_measures(student: Ling, teacher: Ling, windows_NT: Tensor, *, bf16: bool = False) -> LayerMeasures:
    """Relative error of every attention block's output (after `dense`) on token windows [N, T], and the drift of every router.

    MTP layers come last.
    """
    kinds = [student.config.layer_kind(i) for i in range(len(student.model.layers))]
    sums = torch.zeros(len(kinds), 3, dtype=torch.float64)  # local error, propagated error, teacher's energy
    routers: dict[int, RouterSums] = {}
    for ids in _batches(windows_NT):
        for step in walk(teacher, student, [ids.to(teacher.lm_head.weight.device)], bf16=bf16):
            teacher_h, student_h = step.teacher_h[0], step.student_h[0]
            target = step.teacher.attention(step.teacher.input_layernorm(teacher_h), step.teacher_call)
            local, own = (
                step.student.attention(step.student.input_layernorm(h), step.student_call) for h in (teacher_h, student_h)
            )
            energy = target.double()
            errors = (local.double() - energy, own.double() - energy, energy)
            sums[step.index] += torch.stack([x.square().sum().cpu() for x in errors])
            if isinstance(step.teacher.mlp, SparseMoE) and isinstance(step.student.mlp, SparseMoE):
                drift = routers.setdefault(step.index, RouterSums())
                drift.add((step.teacher, teacher_h, target), (step.student, student_h, own))
    errors_by_layer = [
        LayerError(layer=i, kind=kind, local=relative(local, energy), propagated=relative(propagated, energy))
        for i, (kind, (local, propagated, energy)) in enumerate(zip(kinds, sums, strict=True))
    ]
    return LayerMeasures(errors_by_layer, [sums.result(i) for i, sums in sorted(routers.items())])


# ---------------------------------------------------------------------------------------------------------------------
# Recall and samples
# ---------------------------------------------------------------------------------------------------------------------


def needle_fits(tokenizer: Any, filler_ids: Sequence[int], length: int, *, keys: int = 1) -> bool:
    """Whether `length` tokens hold the facts and the question, and the filler is long enough."""
    try:
        make_needle(tokenizer, filler_ids, length=length, depth=0.5, seed=0, keys=keys)
    except UserError:
        return False
    return True


@torch.inference_mode()
def needle_recall(
    model: Ling,
    tokenizer: Any,
    filler_ids: Sequence[int],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    keys: int = 1,
    bf16: bool = False,
) -> list[Recall]:
    """Needle recall at each length (tokens, answer included) over all depths, `samples` cases each; see `make_needle`.

    keys: facts in the text, one of which is asked for.

    An answer counts as exact when each of its tokens is the likeliest after the true ones before it: then, and only then,
    greedy decoding writes it too.
    """
    device = model.lm_head.weight.device
    out: list[Recall] = []
    for length in lengths:
        cases = [
            make_needle(tokenizer, filler_ids, length=length, depth=depth, seed=seed + i, keys=keys)
            for depth in depths
            for i in range(samples)
        ]
        ids_NT = torch.tensor([case.prompt + case.answer for case in cases])
        right: list[list[bool]] = []
        for h, ids in zip(_hidden(model, ids_NT, bf16), _batches(ids_NT), strict=True):
            for row, one in zip(h, ids.to(device), strict=True):
                size = len(cases[len(right)].answer)
                right.append((model.logits(row[-size - 1 : -1]).argmax(-1) == one[-size:]).tolist())
        by_depth = [right[i * samples : (i + 1) * samples] for i in range(len(depths))]
        rows = [DepthRecall(depth=depth, **_shares(part)) for depth, part in zip(depths, by_depth, strict=True)]
        out.append(Recall(length=length, depths=rows, **_shares(right)))
    return out


class _Shares(TypedDict):
    exact: float
    token_accuracy: float
    n: int


def _shares(right: Sequence[Sequence[bool]]) -> _Shares:
    """Of cases, each with which of its answer's tokens are right."""
    tokens = [ok for case in right for ok in case]
    return {"exact": sum(map(all, right)) / len(right), "token_accuracy": sum(tokens) / len(tokens), "n": len(right)}


def sample_completions(
    model: Ling, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 64, bf16: bool = False
) -> list[Sample]:
    """Greedy continuation of each prompt, up to the end-of-text token; special tokens are left out of the text."""
    device = model.lm_head.weight.device
    ends = stop_ids(tokenizer, model.config)
    out: list[Sample] = []
    for prompt in prompts:
        ids_1T = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            new = generate(model, ids_1T, Sampling(max_new_tokens=max_new_tokens), stop_ids=ends)[0]
        out.append(Sample(prompt=prompt, completion=tokenizer.decode(new, skip_special_tokens=True)))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decode_profile(model: Ling, contexts: Sequence[int], *, steps: int = 8) -> list[DecodeRow]:
    """Cache size and median time per token of one sequence at each context; see `DecodeRow`.

    The cache is filled with noise of the right shapes instead of by a prefill: size and speed do not depend on values. One
    step before the clock starts is not counted.
    """
    c, weight = model.config, model.lm_head.weight
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    rows: list[DecodeRow] = []
    for context in contexts:
        cache = noise_cache(model, context, spare=steps + 1)
        held = cache.nbytes
        model(token, cache=cache)
        times = [_timed_step(model, token, cache) for _ in range(steps)]
        expected = context * kv_bytes_per_token(c, weight.element_size()) + state_bytes_per_sequence(c)
        rows.append(
            DecodeRow(
                context=context,
                cache_bytes=held,
                formula_bytes=expected,
                ms_per_token=1000 * statistics.median(times),
                peak_bytes=memory_bytes(weight.device),
            )
        )
    return rows


def _timed_step(model: Ling, token: Tensor, cache: Cache) -> float:
    """Seconds of one decoding step, the choice of the token included: it waits for a GPU."""
    started = time.perf_counter()
    model(token, cache=cache)[:, -1].argmax(-1).item()
    return time.perf_counter() - started


def noise_cache(model: Ling, context: int, *, spare: int = 0) -> Cache:
    """A cache for one sequence as if `context` tokens had been seen, with room for `spare` more before it has to grow."""
    c, weight = model.config, model.lm_head.weight
    heads, dim = (c.num_key_value_heads, c.head_dim), (c.num_attention_heads, c.head_dim, c.head_dim)
    row_shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "gqa": (heads, heads),
        "mla": ((c.kv_lora_rank or 0,), (c.qk_rope_head_dim or 0,)),
    }
    cache = model.new_cache()
    for kind, layer in zip(c.layer_kinds, cache.layers, strict=True):
        if kind == "lightning":
            layer.state = torch.randn(1, *dim, device=weight.device)
            continue
        for buffer, shape in zip((layer.keys, layer.values), row_shapes[kind], strict=True):
            buffer.append(torch.randn(1, context + spare, *shape, dtype=weight.dtype, device=weight.device))
            buffer.crop(context)
    cache.advance(context)
    return cache
