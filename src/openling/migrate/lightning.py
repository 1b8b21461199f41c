"""GQA to Lightning: widening K and V, matching heads to decays, and the closed-form fits of norm, gate and output projection.

Sources: Ling-2.6 report p. 6 (what is widened and what is new); look-back matching and the fits are ours.
Legend: B windows, T tokens, M hidden size, H query heads, K key/value heads, D head dim, C = H * D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openling.errors import Failure
from openling.migrate.calibrate import Gram, LayerStep, relative
from openling.model.ling import GroupedQueryAttention, LightningAttention

# Standard deviation of new weights in the Ling-2.0 initialisation, used where the report says "random".
NEW_WEIGHT_STD = 0.006


def split_heads(attention: GroupedQueryAttention, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k, v of `query_key_value` as [heads, D, ...] (`name` is weight or bias; None where there is no bias)."""
    packed = getattr(attention.query_key_value, name)
    if packed is None:
        return None
    heads = packed.detach().unflatten(0, (-1, attention.dim))
    q, k, v = heads.split((attention.heads, attention.kv_heads, attention.kv_heads))
    return q, k, v


def replicate(kv_heads: Tensor, heads: int) -> Tensor:
    """Each K/V head once per query head that reads it, [K, D, ...] to [H, D, ...]: exact for softmax attention."""
    return kv_heads.repeat_interleave(heads // kv_heads.shape[0], dim=0)


def randomise(kv_heads: Tensor, heads: int, generator: torch.Generator) -> Tensor:
    """The originals at the first head of each group, all other heads random (the report's literal reading)."""
    wide = torch.randn((heads, *kv_heads.shape[1:]), generator=generator) * NEW_WEIGHT_STD
    wide = wide.to(kv_heads)
    wide[:: heads // kv_heads.shape[0]] = kv_heads
    return wide


def look_back(attention: GroupedQueryAttention, step: LayerStep) -> Tensor:
    """Mean distance in tokens at which each head of the teacher reads, [H]: t - sum_s p_ts s, averaged over t.

    The position rides along as the only value channel, so that no T x T matrix is formed.
    """
    from openling.ops.attention import softmax_attention
    from openling.ops.rope import apply_rope

    total, rows = torch.zeros(attention.heads, dtype=torch.float64), 0
    for h in step.teacher_h:
        qkv = attention.query_key_value(step.teacher.input_layernorm(h)).unflatten(-1, (-1, attention.dim))
        q, k, _ = qkv.split((attention.heads, attention.kv_heads, attention.kv_heads), dim=2)
        if attention.qk_norm:
            q, k = attention.query_layernorm(q), attention.key_layernorm(k)
        q, k = apply_rope(q, *step.teacher_call.tables.head), apply_rope(k, *step.teacher_call.tables.head)
        position = torch.arange(h.shape[1], dtype=torch.float32, device=h.device)
        value = position[None, :, None, None].expand(h.shape[0], -1, attention.kv_heads, 8)
        with torch.autocast(h.device.type, enabled=False):  # BF16 knows no odd positions beyond 256
            seen = softmax_attention(q.float(), k.float(), value, scale=attention.dim**-0.5)[..., 0]
        total += (position[None, :, None] - seen).double().sum((0, 1)).cpu()
        rows += h.shape[0] * h.shape[1]
    return total / rows


def match_heads(distance_H: Tensor, log_decay_H: Tensor) -> Tensor:
    """Permutation p [H]: new head j, with the j-th decay, takes teacher head p[j]; far readers get slow decays."""
    by_half_life = (-log_decay_H).argsort(descending=True, stable=True)
    by_distance = distance_H.argsort(stable=True)
    order = torch.empty_like(by_distance)
    order[by_half_life] = by_distance
    return order


@torch.no_grad()
def widen(
    source: GroupedQueryAttention,
    target: LightningAttention,
    *,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Fill `target` from `source`: widened q, k, v, the copied output projection, QK-norm weights where there are any.

    With a `generator` new K/V heads and the gate are random (the published start); without, K and V are replicated and
    the gate is zero. `order` permutes heads of q, k, v and the output projection jointly, which is exact.
    """
    heads = source.heads
    order = torch.arange(heads) if order is None else order
    for name in ("weight", "bias"):
        parts = split_heads(source, name)
        if parts is None:
            continue
        q, k, v = parts
        grow = replicate if generator is None else lambda x, h: randomise(x, h, generator)
        wide = [x[order].flatten(0, 1) for x in (q, grow(k, heads), grow(v, heads))]
        getattr(target.query_key_value, name).copy_(torch.cat(wide))
    columns = source.dense.weight.unflatten(1, (heads, source.dim))[:, order]
    target.dense.weight.copy_(columns.flatten(1))
    if source.dense.bias is not None:
        target.dense.bias.copy_(source.dense.bias)
    if source.qk_norm:
        target.query_layernorm.weight.copy_(source.query_layernorm.weight)
        target.key_layernorm.weight.copy_(source.key_layernorm.weight)
    if generator is None:
        target.g_proj.weight.zero_()
    else:
        noise = torch.randn(target.g_proj.weight.shape, generator=generator) * NEW_WEIGHT_STD
        target.g_proj.weight.copy_(noise)


def check_alive(layer: int, source: GroupedQueryAttention, target: LightningAttention) -> None:
    """A `Failure` where softmax attention says something and linear attention cannot: without queries or keys it reads the mean
    of the values, Lightning nothing. A layer that said nothing before may well say nothing after."""
    packed = (source.query_key_value.weight, source.query_key_value.bias)
    values = [part.detach()[-source.kv_heads * source.dim :] for part in packed if part is not None]
    if not (any(part.any() for part in values) and source.dense.weight.any()):
        return
    new = (target.query_key_value.weight, target.query_key_value.bias)
    wide = target.query_key_value.weight.shape[0] // 3
    for number, name in enumerate(("q_proj", "k_proj")):
        parts = [part.detach()[number * wide : (number + 1) * wide] for part in new if part is not None]
        if not any(part.any() for part in parts):
            raise Failure(
                "the layer cannot become Lightning: its attention scores are all alike, and linear attention would output zero",
                where=f"layer {layer}",
                value=f"{name} is all zero",
                expected="queries and keys that are not zero",
                next=f"name it among the layers that become MLA (--layout {layer},...), which keeps its function, "
                "or check that the folder was trained and copied whole",
            )


# Steps that are tried along the gate's direction, by channel; 0 leaves it at one half.
GATE_STEPS = (0.0, 0.125, 0.25, 0.5, 1.0)


@torch.no_grad()
def refit_norm_and_gate(step: LayerStep, *, order: Tensor, damping: float, gate: bool) -> float:
    """Fit group norm gamma, and with `gate` the gate's W, to what the teacher's heads say, channel by channel; the squared error
    that is left, relative to the teacher's heads.

    With z the normed kernel output, a = W x and y the teacher's channel, sum (y - gamma z sigmoid(a))^2 is to be small. At W = 0
    the best gamma is 2 <y, z> / <z, z>. From there one Newton step, sigmoid(a) ~ 1/2 + a / 4, with the second moment of z x
    taken as E[z^2] E[x x^T], so that all channels share one damped solve; its length is chosen by channel on the last batch,
    which the step does not see (unless it is the only one), and gamma anew with the gate it gets.

    order: teacher's head of each of the student's.
    """
    mixer = step.student.attention
    assert isinstance(mixer, LightningAttention)
    mixer.g_norm.weight.fill_(1.0)
    if gate:
        batches = list(range(len(step.student_h)))
        direction = _gate_direction(step, mixer, order, batches[:-1] or batches, damping)
        sums = _gated_sums(step, mixer, order, batches[-1:], direction, GATE_STEPS)
        gained = sums[:, 0].square() / sums[:, 1].clamp(min=1e-30)  # what the best gamma explains, [steps, C]
        scales = torch.tensor(GATE_STEPS).to(gained)[gained.argmax(0)]
        mixer.g_proj.weight.copy_(direction * scales[:, None])
    yz, zz, yy = _gated_sums(step, mixer, order, range(len(step.student_h)), mixer.g_proj.weight, (1.0,))[0]
    gamma = yz / zz.clamp(min=1e-30)
    mixer.g_norm.weight.copy_(gamma)
    return relative((yy - gamma * yz).clamp(min=0.0).sum(), yy.sum())


def _heads_and_outputs(step: LayerStep, mixer: LightningAttention, order: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one batch: the student's inputs [N, M], its normed kernel outputs [N, C], the teacher's heads in its order [N, C]."""
    teacher = step.teacher.attention
    assert isinstance(teacher, GroupedQueryAttention)
    x = step.student.input_layernorm(step.student_h[batch])
    z = mixer.g_norm(mixer.kernel(x, step.student_call).to(x.dtype))
    y = teacher.mix(step.teacher.input_layernorm(step.teacher_h[batch]), step.teacher_call)
    y = y.unflatten(-1, (teacher.heads, -1))[:, :, order.to(y.device)].flatten(2)
    return x.flatten(0, 1).double(), z.flatten(0, 1).double(), y.flatten(0, 1).double()


def _gate_direction(step: LayerStep, mixer: LightningAttention, order: Tensor, batches: Sequence[int], damping: float) -> Tensor:
    """W [C, M] of the Newton step from W = 0 at the best gamma."""
    gram, sums = Gram(), []
    for batch in batches:
        x, z, y = _heads_and_outputs(step, mixer, order, batch)
        gram.add(x, torch.cat((y * z, z * z), dim=1))
        sums.append(torch.stack(((y * z).sum(0), (z * z).sum(0))))
    yz, zz = torch.stack(sums).sum(0)
    gamma = 2 * yz / zz.clamp(min=1e-30)
    assert gram.zy is not None
    # d/dW of the error is gamma / 4 <(y - gamma z / 2) z, x>, its curvature (gamma / 4)^2 <z^2> C.
    cross_y, cross_z = gram.zy.chunk(2, dim=1)
    gram.zy = (cross_y - gamma / 2 * cross_z) * gram.count / zz.clamp(min=1e-30)
    return gram.ridge(damping) * (4 / gamma)[:, None].nan_to_num(posinf=0.0, neginf=0.0)


def _gated_sums(
    step: LayerStep,
    mixer: LightningAttention,
    order: Tensor,
    batches: Sequence[int],
    direction: Tensor,
    scales: Sequence[float],
) -> Tensor:
    """Sums over tokens of y g, g g and y y with g = z sigmoid(scale * W x), [scales, 3, C]."""
    sums = []
    for batch in batches:
        x, z, y = _heads_and_outputs(step, mixer, order, batch)
        a = x @ direction.double().T
        gated = [z * torch.sigmoid(scale * a) for scale in scales]
        sums.append(torch.stack([torch.stack(((y * g).sum(0), (g * g).sum(0), (y * y).sum(0))) for g in gated]))
    return torch.stack(sums).sum(0)


@torch.no_grad()
def refit_output(step: LayerStep, *, damping: float) -> float:
    """Ridge regression of the mixer's target on the input of `dense`, towards the present weights; a bias stays as it is.

    Returns the squared error that is left, relative to the target (less the bias). Works for any mixer with `mix` and `dense`.
    """
    mixer = step.student.attention
    gram, energy = Gram(), 0.0
    bias = mixer.dense.bias
    for x, y in zip(step.inputs(), step.targets(), strict=True):
        z = mixer.mix(x, step.student_call)
        y = y if bias is None else y - bias
        gram.add(z, y)
        energy += float(y.double().pow(2).sum())
    weight = gram.ridge(damping, mixer.dense.weight)
    assert gram.zz is not None and gram.zy is not None
    explained = 2 * (weight.T * gram.zy).sum() - ((weight @ gram.zz) * weight).sum()
    mixer.dense.weight.copy_(weight)
    return relative((energy - explained).clamp(min=0.0), energy)
