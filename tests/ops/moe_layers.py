"""Layers of experts for the kernels' tests: tensors, choices, and the twin in pieces, expert by expert."""

import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def layer(tokens, model=48, width=32, experts=8, seed=0, dtype=torch.float32):
    """x, router, bias, gate, up, down."""
    shapes = (
        (tokens, model),
        (experts, model),
        (experts,),
        (experts, width, model),
        (experts, width, model),
        (experts, model, width),
    )
    scales = 1, model**-0.5, 0.1, model**-0.5, model**-0.5, width**-0.5
    halves = (dtype, torch.float32, torch.float32, dtype, dtype, dtype)
    return [
        (randn(*shape, seed=seed + i) * scale).to(half)
        for i, (shape, scale, half) in enumerate(zip(shapes, scales, halves, strict=True))
    ]


def options(spec):
    return dict(zip(("top_k", "n_group", "topk_group", "score_function", "norm_topk_prob", "scaling_factor"), spec, strict=True))


def weights_of(x, router, index, spec):
    """The twin's weights for a choice that is given, in FP64."""
    logits = x @ router.T
    scores = logits.sigmoid() if spec.score_function == "sigmoid" else logits.softmax(-1)
    weight = scores.gather(-1, index)
    if spec.norm_topk_prob and spec.top_k > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * spec.scaling_factor


def summed(x, weight, index, gate, up, down, rounded=lambda rows: rows):
    """The experts' sum, expert by expert; `rounded`: what happens to the rows that a product reads."""
    out = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        n, j = (index == e).nonzero(as_tuple=True)
        read = rounded(x[n])
        y = F.linear(rounded(F.silu(F.linear(read, gate[e])) * F.linear(read, up[e])), down[e])
        out = out.index_add(0, n, y * weight[n, j, None])
    return out


def worst(found, expected):
    """Largest error relative to the largest value."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def choices(tokens, top_k, experts, kind):
    generator = torch.Generator().manual_seed(tokens)
    if kind == "one":
        return torch.full((tokens, 1), experts - 2, device=DEVICE)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "skewed":
        scores += torch.arange(experts) * 0.4
    return scores.topk(top_k).indices.to(DEVICE)


def block_fp8(weight):
    """e4m3 values and FP32 scales per 128 x 128 of [E, rows, columns]."""
    blocks = weight.float().unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    scale = blocks.abs().amax((2, 4)) / 448
    return (blocks / scale[:, :, None, :, None]).flatten(3).flatten(1, 2).to(torch.float8_e4m3fn), scale


def rows_fp8(x):
    """e4m3 values and FP32 scales per row and 128 columns, rounded to the nearest."""
    blocks = x.float().unflatten(1, (-1, 128))
    scale = blocks.abs().amax(2) / 448
    scale = torch.where(scale > 0, scale, 1.0)
    return (blocks / scale[..., None]).flatten(1).to(torch.float8_e4m3fn), scale


def through_fp8(x):
    """x in FP64 as block FP8 holds it."""
    values, scale = rows_fp8(x)
    return (values.double().unflatten(1, (-1, 128)) * scale.double()[..., None]).flatten(1)
