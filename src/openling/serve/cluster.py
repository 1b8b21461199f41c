"""`openling serve --engine sglang|vllm`: the exact command for a cluster's engine, run where that engine is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from openling.errors import UserError
from openling.weights.cluster import (
    READ_VERSIONS,
    EngineName,
    Launch,
    command,
    default_tensor_parallel,
    drafts,
    read_checkpoint,
)


def launch(
    engine: EngineName,
    model: Path,
    *,
    tp: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_model_len: int | None = None,
    dtype: str = "auto",
    run: bool = True,
) -> int:
    """Print the command that serves `model` and become it, if the engine is installed and `run`; else exit code 0.

    tp: GPUs to split the model over; None: as few as hold the weights. max_model_len: context in tokens; beyond the model's own
    it asks for YaRN. Raises UserError for a model or a split that the engine would refuse or misread.
    """
    if max_model_len is not None and max_model_len < 1:
        raise UserError("a context holds at least one token", where="--max-model-len", value=max_model_len)
    if not 1 <= port <= 65535:
        raise UserError("not a port", where="--port", value=port, expected="1 to 65535")
    checkpoint = read_checkpoint(model)
    found = installed(engine)
    split = default_tensor_parallel(checkpoint) if tp is None else tp
    chosen = Launch(tp=split, host=host, port=port, max_model_len=max_model_len, dtype=dtype, version=found or "")
    words = command(engine, checkpoint, str(model), chosen)
    print(shlex.join(words), flush=True)
    if checkpoint.hybrid and checkpoint.config.num_nextn_predict_layers and not drafts(checkpoint):
        print(f"No speculation: {engine} drafts with one sparse MLA layer whose tensors are there.", file=sys.stderr)
    program = sys.executable if words[0] == "python" else shutil.which(words[0])
    if run and (found is None or program is None):
        checked = READ_VERSIONS[engine]
        print(f"{engine} is not installed here: run this where it is (flags checked against {checked}).", file=sys.stderr)
    elif run and program:
        os.execv(program, [program, *words[1:]])
    return 0


def installed(engine: EngineName) -> str | None:
    """The version of an installed engine."""
    try:
        return version(engine)
    except PackageNotFoundError:
        return None
