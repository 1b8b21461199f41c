"""The two conversions of a migration on whole models: GQA to Lightning, and the remaining GQA to MLA.

Both build a student that shares every unchanged tensor with its source, then walk through the layers with the calibration
windows. What each approximate step costs is returned by name and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from openling.config.migrate import Conversion
from openling.errors import Failure, UserError
from openling.migrate.calibrate import LayerStep, walk
from openling.migrate.findings import Approximation, Findings, HeadSpans, Spectrum
from openling.migrate.fold import attention_received, best_fold, check_fold
from openling.migrate.lightning import check_alive, look_back, match_heads, refit_norm_and_gate, refit_output, widen
from openling.migrate.mla import Projections, fill_mla, kv_spectrum
from openling.migrate.qknorm import remove_norms
from openling.migrate.ranks import share_ranks
from openling.migrate.stack import unfitted
from openling.model.config import ModelConfig
from openling.model.ling import GroupedQueryAttention, LatentAttention, LightningAttention, Ling
from openling.ops.lightning import log_decay

P = ParamSpec("P")
OnLayer = Callable[[int], None]
# Between the seeds of neighbouring layers (the golden ratio in 64 bits).
SEED_STEP = 0x9E3779B97F4A7C15


def derive(source: Ling, config: ModelConfig) -> Ling:
    """A model of another configuration on the same weights: layers of the same kind share their tensors with `source`.

    Mixers that change kind start with unit norms and zero matrices; the conversions fill them.
    """
    with torch.device("meta"):
        model = Ling(config)
    old = source.state_dict()
    like = source.lm_head.weight
    changed = {i for i in range(len(model.model.layers)) if config.layer_kind(i) != source.config.layer_kind(i)}
    prefixes = tuple(f"model.layers.{i}.attention." for i in changed)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state[name] = unfitted(name, tensor, like) if name.startswith(prefixes) else old[name]
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_lightning(
    teacher: Ling,
    config: ModelConfig,
    windows: Sequence[Tensor],
    options: Conversion,
    *,
    seed: int,
    on_layer: OnLayer,
    bf16: bool,
) -> tuple[Ling, Findings]:
    """Every layer that `config` calls Lightning, from a GQA teacher; the other layers stay as they are."""
    student = derive(teacher, config)
    found = Findings()
    for step in walk(teacher, student, windows, bf16=bf16):
        found.add(fit_lightning(step, options, seed))
        on_layer(step.index)
    return student, found


def to_mla(
    source: Ling, config: ModelConfig, windows: Sequence[Tensor], options: Conversion, *, on_layer: OnLayer, bf16: bool
) -> tuple[Ling, Findings]:
    """Every layer that `config` calls MLA, from the GQA layers of `source` (the model after the linear warm-up)."""
    student = derive(source, config)
    ranks = _ranks(source, config, windows, options, bf16) if options.kv_rank_budget else {}
    found = Findings([Approximation("latent rank", i, "dims in use", rank) for i, rank in ranks.items()])
    for step in walk(source, student, windows, bf16=bf16):
        found.add(fit_mla(step, options, config.rotary_dim, rank=ranks.get(step.index)))
        on_layer(step.index)
    return student, found


@torch.no_grad()
def _ranks(source: Ling, config: ModelConfig, windows: Sequence[Tensor], options: Conversion, bf16: bool) -> dict[int, int]:
    """Latent ranks of the layers that become MLA, from a walk of the source alone."""
    spectra: dict[int, Tensor] = {}
    for step in walk(source, source, windows, bf16=bf16):
        old = step.teacher.attention
        if config.layer_kind(step.index) != "mla" or not isinstance(old, GroupedQueryAttention):
            continue
        inputs = step.mixer_inputs(partial(_with_bias_input, attention=old))
        weights, _ = without_qk_norm(old, inputs, options)
        spectra[step.index] = kv_spectrum(
            weights,
            old.dense.weight,
            inputs,
            rotary=config.rotary_dim,
            rope=config.qk_rope_head_dim or 0,
            balance=options.balance,
            query_weighted=options.query_weighted_rope,
            attention=_attention(step, weights, inputs, options),
        )
    assert options.kv_rank_budget
    ranks = share_ranks(list(spectra.values()), options.kv_rank_budget, config.kv_lora_rank or 0)
    return dict(zip(spectra, ranks, strict=True))


def check_mla(options: Conversion, config: ModelConfig) -> None:
    """A UserError for options that the MLA layers of `config` cannot follow."""
    check_fold(options.rope_fold, config.rotary_dim, config.qk_rope_head_dim or 0)
    widest = config.kv_lora_rank or 0
    if options.kv_rank_budget and options.kv_rank_budget > widest:
        raise UserError(
            "a mean rank lies within the width of the latents",
            where="--conversion.kv_rank_budget",
            value=options.kv_rank_budget,
            expected=f"1 to kv_lora_rank = {widest}",
        )


def _names_layer(fit: Callable[Concatenate[LayerStep, P], Findings]) -> Callable[Concatenate[LayerStep, P], Findings]:
    """Algebra without a solution ends in a `Failure` that says where."""

    @wraps(fit)
    def named(step: LayerStep, *args: P.args, **kwargs: P.kwargs) -> Findings:
        try:
            return fit(step, *args, **kwargs)
        except torch.linalg.LinAlgError as error:
            raise Failure(
                "the algebra of this layer's conversion has no solution",
                where=f"layer {step.index}",
                value=str(error).splitlines()[0],
                next="look for damaged rows in its attention weights; a layout in which it becomes of the other kind may do",
            ) from error

    return named


@_names_layer
@torch.no_grad()
def fit_lightning(step: LayerStep, options: Conversion, seed: int, *, text: bool = True) -> Findings:
    """Fill the student's mixer where it is Lightning and the teacher's is not; `text`: the inputs are those of real text."""
    target, source = step.student.attention, step.teacher.attention
    if not (isinstance(target, LightningAttention) and isinstance(source, GroupedQueryAttention)):
        return Findings()
    # A generator of its own for every layer, so that a conversion can go on in the middle.
    generator = torch.Generator().manual_seed((seed + step.index * SEED_STEP) % 2**63) if options.kv_heads == "random" else None
    order, decay, found = torch.arange(source.heads), log_decay(*target.decay_of), Findings()
    if text or options.match_heads:
        distance = look_back(source, step)
        order = match_heads(distance, decay) if options.match_heads else order
        found.heads.append(HeadSpans.of(step.index, decay, distance[order]))
    widen(source, target, order=order, generator=generator)
    check_alive(step.index, source, target)
    if options.refit_norm or options.refit_gate:
        error = refit_norm_and_gate(step, order=order, damping=options.damping, gate=options.refit_gate)
        what = "relative error after the fit of norm and gate"
        found.approximations.append(Approximation("Lightning heads", step.index, what, error))
    found.approximations += _refit(step, options, options.damping, "softmax attention replaced by Lightning")
    return found


@_names_layer
@torch.no_grad()
def fit_mla(step: LayerStep, options: Conversion, rotary_dim: int, *, rank: int | None = None) -> Findings:
    """Fill the student's mixer where it is MLA and the teacher's is not; `rotary_dim` is the teacher's, `rank` the latent dims
    in use (None: all)."""
    target, old = step.student.attention, step.teacher.attention
    if not (isinstance(target, LatentAttention) and isinstance(old, GroupedQueryAttention)):
        return Findings()
    inputs = step.mixer_inputs(partial(_with_bias_input, attention=old))
    weights, removed = without_qk_norm(old, inputs, options)
    steps = [Approximation("QK-norm removal", step.index, f"{name}, relative error", e) for name, e in removed.items()]
    attention = _attention(step, weights, inputs, options)
    fold, errors = _fold(step, target, weights, inputs, options, rotary_dim, attention)
    steps += [Approximation("RoPE folding", step.index, f"error of attention outputs at fold {f}", e) for f, e in errors.items()]
    kept = fill_mla(
        target,
        weights,
        old.dense,
        inputs,
        rotary=rotary_dim,
        balance=options.balance,
        latent_norm=options.latent_norm,
        query_weighted=options.query_weighted_rope,
        fold=fold,
        rank=rank,
        attention=attention,
    )
    steps += [Approximation("MLA factors", step.index, name, value) for name, value in kept.energy.items()]
    ranks = {"kv": rank or target.rank, "query": target.q_a_proj.weight.shape[0] if target.low_rank_query else 0}
    spectra = [Spectrum.of(step.index, part, values, ranks[part]) for part, values in kept.spectra.items()]
    return Findings(steps + _refit(step, options, options.mla_damping, "GQA replaced by MLA"), spectra)


def _attention(step: LayerStep, weights: Projections, inputs: Sequence[Tensor], options: Conversion) -> Sequence[Tensor] | None:
    """What the tokens of every batch receive, where keys and values are fitted by it."""
    if not options.attention_weighted:
        return None
    return [attention_received(weights, x, step.student_call.tables) for x in inputs]


def _fold(
    step: LayerStep,
    target: LatentAttention,
    weights: Projections,
    inputs: Sequence[Tensor],
    options: Conversion,
    rotary: int,
    attention: Sequence[Tensor] | None,
) -> tuple[int, dict[int, float]]:
    """The fold of a layer's frequencies, and what was measured to choose it."""
    if options.rope_fold != "auto":
        return max(options.rope_fold, rotary // target.rope), {}
    tables = step.student_call.tables
    chosen = options.query_weighted_rope
    return best_fold(weights, inputs, tables, rotary=rotary, rope=target.rope, query_weighted=chosen, attention=attention)


def without_qk_norm(
    attention: GroupedQueryAttention, inputs: Sequence[Tensor], options: Conversion
) -> tuple[Projections, dict[str, float]]:
    """The projections of a mixer with any QK-norm folded in, and the relative error of that for q and k."""
    weights = Projections.of(attention)
    if not attention.qk_norm:
        return weights, {}
    norms = (attention.query_layernorm, attention.key_layernorm)
    sizes = (attention.heads, attention.kv_heads)
    gamma = torch.cat([norm.weight.detach().double().expand(size, -1) for norm, size in zip(norms, sizes, strict=True)])
    removals = remove_norms(torch.cat((weights.q, weights.k)), gamma, norms[0].eps, inputs, options.qk_norm_removal, sizes)
    weights.q, weights.k = (r.weight for r in removals)
    weights.v = weights.v.clone()  # a view would keep the old queries
    return weights, {f"{name} ({r.method})": r.error for name, r in zip("qk", removals, strict=True)}


def _refit(step: LayerStep, options: Conversion, damping: float, what: str) -> list[Approximation]:
    if not options.refit_output:
        return []
    error = refit_output(step, damping=damping)
    return [Approximation(what, step.index, "relative error after the refit", error)]


def _with_bias_input(x_BTM: Tensor, attention: GroupedQueryAttention) -> Tensor:
    """Layer inputs as FP64 rows [N, M + 1]; the last column is 1, or 0 where the layer has no bias to put a fit's into."""
    rows = x_BTM.flatten(0, 1).double()
    last = float(attention.query_key_value.bias is not None)
    return torch.cat((rows, rows.new_full((rows.shape[0], 1), last)), dim=1)
