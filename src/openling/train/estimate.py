"""What a recipe will cost, from the recipe alone: parameters, tokens, FLOPs, memory, meshes, and what is not there yet."""

from __future__ import annotations

from pathlib import Path

from openling.config.recipe import RecipeConfig, StageConfig
from openling.model import count
from openling.model.config import ModelConfig
from openling.plan.numbers import short
from openling.train.flops import training_flops
from openling.train.rules import check_stages
from openling.train.stages import first_config, stage_config

# FP32 weights, gradients and two moments of AdamW; Muon has one moment.
BYTES_PER_PARAMETER = {"adamw": 16, "muon": 12}


def estimate(recipe: RecipeConfig, out: Path) -> str:
    """A table of the stages, and what must be there before they can run."""
    config, _ = first_config(recipe, folder=False)
    check_stages(recipe, config)
    total, active = count.total_parameters(config, mtp=True), count.active_parameters(config)
    state = max(BYTES_PER_PARAMETER[s.optimizer] for s in recipe.stages) * total
    lines = [
        f"model    {short(total)} parameters with MTP, {short(active)} active per token",
        f"memory   {state / 2**30:,.1f} GiB of weights, gradients and optimiser state, over all ranks; activations besides",
        f"run      {out}",
        "",
        f"{'stage':<14}{'tokens':>10}{'steps':>15}{'rows':>9}{'length':>11}{'tokens/step':>13}{'lr':>10}{'FLOPs':>10}",
    ]
    flops = 0.0
    for stage in recipe.stages:
        config = stage_config(config, stage)
        tokens, cost = stage.total_tokens, flops_of(config, stage)
        flops += cost
        step = stage.batch_size * stage.sequence_length
        lines.append(
            f"{stage.name:<14}{short(tokens):>10}{stage.total_steps:>15,}{stage.batch_size:>9,}{stage.sequence_length:>11,}"
            f"{short(step):>13}{stage.lr:>10.3g}{cost:>10.2g}"
        )
    lines += ["", *meshes(recipe)]
    lines += ["", f"{flops:.3g} FLOPs in all (forward and backward, MTP included, documents as long as rows)"]
    if recipe.model.teacher is not None:
        following = ", ".join(stage.name for stage in recipe.stages if stage.follows)
        lines.append(f"besides, a forward pass of the teacher and its FP32 weights, in {following}")
    fp8 = {stage.fp8_experts for stage in recipe.stages} - {"none"}
    lines += [
        f"routed experts in FP8, {form}: {', '.join(s.name for s in recipe.stages if s.fp8_experts == form)}"
        for form in sorted(fp8)
    ]
    lines += [f"not there yet: {name}" for name in absent(recipe)]
    return "\n".join(lines)


def meshes(recipe: RecipeConfig) -> list[str]:
    """A table of what ranks share in each stage, and what backward computes again."""
    lines = [f"{'stage':<14}{'recompute':<12}{'gather':<12}mesh"]
    for stage in recipe.stages:
        c = recipe.parallel_of(stage)
        names = ("pipeline", "stages_per_rank", "replicate", "shard", "context", "tensor", "expert")
        axes = [f"{name}={getattr(c, name)}" for name in names if (getattr(c, name) or 1) > 1]
        if c.shard is None or c.rest == "context":
            axes.append(f"{c.rest}=all that are left")
        lines.append(f"{stage.name:<14}{c.recompute:<12}{c.gather:<12}{', '.join(axes)}")
    return lines


def flops_of(config: ModelConfig, stage: StageConfig) -> float:
    """FLOPs of a stage whose documents fill their rows: the most it can be."""
    steps = (stage.mtp_steps or config.num_nextn_predict_layers) if stage.mtp else 0
    return training_flops(config, stage.total_tokens, stage.sequence_length / 2, steps)


def absent(recipe: RecipeConfig) -> list[str]:
    """Folders that the recipe names and that do not exist."""
    wanted = [folder for folder in (recipe.model.folder, recipe.model.teacher) if folder]
    if recipe.model.tokenizer not in (None, "bytes"):
        wanted.append(recipe.model.tokenizer)
    for stage in recipe.stages:
        for source in stage.mixture.sources:
            corpus = recipe.corpora.get(source.corpus)
            path = source.corpus if corpus is None else corpus.path
            if path is not None and path not in wanted:
                wanted.append(path)
    return [name for name in wanted if name is not None and not Path(name).exists()]
