"""The teacher that a recipe names: what its stages' `kl` and `align` follow, on the student's mesh.

With it warm-ups of a migration run on any number of ranks: converted by `openling convert` or `openling migrate`, trained here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openling.config.recipe import RecipeConfig
from openling.data.tokens import describe
from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import Ling
from openling.parallel.apply import Parallel, apply
from openling.parallel.fill import fill, give_memory
from openling.parallel.mesh import Mesh
from openling.weights.folder import Opened, check_tied, load_tokenizer, open_folder, read_binding
from openling.weights.io import read_hf_config

WHERE = "model.teacher"


def teacher_config(recipe: RecipeConfig) -> ModelConfig | None:
    """The shape of the recipe's teacher; None without one."""
    folder = recipe.model.teacher
    return None if folder is None else read_config(read_hf_config(folder), where=Path(folder) / "config.json")


def check_teacher(recipe: RecipeConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    """A `UserError` where stages cannot follow a teacher of this shape."""
    pairs = [("vocab_size", "this teacher predicts other tokens")]
    if any(stage.align for stage in recipe.stages):
        what = "hidden states of another shape cannot be aligned"
        pairs += [("num_hidden_layers", what), ("hidden_size", what)]
    for name, what in pairs:
        found, wanted = getattr(teacher, name), getattr(student, name)
        if found != wanted:
            raise UserError(what, where=WHERE, value=f"{name} = {found}", expected=f"{wanted}, as the model has")


def check_tokens(folder: str, tokenizer: Any) -> None:
    """A `UserError` where the teacher reads text as other tokens. A folder without a tokenizer is taken at its word."""
    theirs = load_tokenizer(folder)
    if theirs is not None and describe(theirs)[0] != describe(tokenizer)[0]:
        raise UserError(
            "the teacher has another tokenizer", where=WHERE, value=folder, expected="a teacher with the tokenizer of the run",
            next="name as model.tokenizer a folder with the teacher's, and build the corpora with that",
        )  # fmt: skip


def fill_from(opened: Opened, parallel: Parallel, device: torch.device) -> None:
    """A folder's weights in FP32, for a model whose memory is there."""
    check_tied(opened)
    fill(parallel, lambda name, shape: read_binding(opened, name, shape, device, torch.float32))


def load_teacher(folder: str, mesh: Mesh | None, device: torch.device, *, model_dtype: torch.dtype | None, seq_len: int) -> Ling:
    """The teacher, shared among ranks as the student is; every rank. model_dtype: as for `parallel.apply`."""
    opened = open_folder(folder)
    with torch.device("meta"):
        model = Ling(opened.config)
    parallel = apply(model, mesh, model_dtype=model_dtype, seq_len=seq_len)
    give_memory(parallel, device)
    fill_from(opened, parallel, device)
    return parallel.model.eval()
