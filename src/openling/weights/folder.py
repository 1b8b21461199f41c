"""`load`: any supported Hugging Face folder as an openling model, filled tensor by tensor.

Peak memory is one model and one tensor. Everything that can be checked from the headers is checked before weights are read.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openling.errors import UserError, nearest
from openling.model.config import ModelConfig
from openling.model.families import family_of, read_config
from openling.model.ling import Ling
from openling.weights.fp8 import Dequantised, opened_values
from openling.weights.io import CheckpointReader, TensorFiles, checked_folder, read_hf_config
from openling.weights.names import RECOMPUTED, Binding, bind

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
LM_HEAD, EMBEDDINGS = "lm_head.weight", "model.word_embeddings.weight"


@dataclass
class Loaded:
    """A checkpoint folder in memory. `model` is in eval mode; `tokenizer` is None where the folder has none."""

    model: Ling
    config: ModelConfig
    tokenizer: Any
    folder: Path
    hf_config: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """A checkpoint folder whose headers were checked: where each of our tensors lies. `stored` is the commonest dtype.

    `reader` gives values: FP8 matrices as FP32, which then counts as their dtype.
    """

    folder: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    reader: TensorFiles
    bindings: dict[str, Binding]
    shapes: dict[str, torch.Size]
    stored: torch.dtype

    @property
    def raw(self) -> CheckpointReader:
        """The folder's tensors as they are stored: FP8 matrices as FP8, and their scales."""
        raw = self.reader.raw if isinstance(self.reader, Dequantised) else self.reader
        assert isinstance(raw, CheckpointReader)
        return raw


def open_folder(folder: str | Path) -> Opened:
    """Check a local checkpoint folder of any family in `openling.model.families`, from its config and headers alone.

    Raises UserError for absent or damaged files, an unknown architecture, a config that contradicts the weights.
    """
    folder = checked_folder(folder)
    hf = read_hf_config(folder)
    family = family_of(hf, where=folder / "config.json")
    config = read_config(hf, where=folder / "config.json")
    reader = opened_values(CheckpointReader(folder), hf)
    config = _without_absent_mtp(config, reader)
    with torch.device("meta"):
        model = Ling(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    bindings = bind(family.architecture, config, shapes, present=reader)
    _check_names_and_shapes(reader, bindings, shapes)
    by_name = {b.ours: b for b in bindings}
    return Opened(folder, config, hf, reader, by_name, shapes, _stored_dtype(reader, bindings))


def load(folder: str | Path | Opened, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Load a local checkpoint folder of any family in `openling.model.families`, opened already or not.

    dtype: of all weights (the router's selection bias stays FP32); None keeps the stored one, the commonest if several.
    Raises UserError for whatever is wrong with the folder: absent or damaged files, an unknown architecture, a config
    that contradicts the weights, NaN or infinite weights, a tokenizer with more ids than the vocabulary.
    """
    opened = folder if isinstance(folder, Opened) else open_folder(folder)
    config = opened.config
    tokenizer = load_tokenizer(opened.folder, config)
    device = torch.device(device)
    state = {name: read_binding(opened, name, opened.shapes[name], device, dtype) for name in opened.bindings}
    if config.tie_word_embeddings:
        _check_tied(state, opened.folder)
        state[LM_HEAD] = state[EMBEDDINGS]
    with torch.device("meta"):
        model = Ling(config)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.word_embeddings.weight
    return Loaded(model.eval(), config, tokenizer, opened.folder, opened.hf_config)


def load_tokenizer(folder: str | Path, config: ModelConfig | None = None) -> Any:
    """The folder's `transformers` tokenizer, or None where it has none. `config` checks that its ids fit the vocabulary."""
    folder = checked_folder(folder)
    if not any((folder / name).exists() for name in _VOCABULARIES):
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it reads config.json, too, and warns of model types and keys that are none of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            "the tokenizer cannot be read", where=folder, value=error, next="copy the tokenizer files again"
        ) from error
    finally:
        logging.set_verbosity(before)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if config is not None and largest >= config.vocab_size:
        raise UserError(
            "the tokenizer is of another model: it has ids beyond the vocabulary",
            where=folder,
            value=f"id {largest}",
            expected=f"ids below vocab_size = {config.vocab_size}",
        )
    return tokenizer


def _without_absent_mtp(config: ModelConfig, reader: TensorFiles) -> ModelConfig:
    """Some releases promise MTP layers in config.json and leave their weights out."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    prefixes = tuple(f"model.layers.{first + k}." for k in range(count))
    if not count or any(name.startswith(prefixes) for name in reader.names()):
        return config
    warnings.warn(
        f"{reader.folder}: config.json promises {count} MTP layer(s), the weights hold none; loaded without MTP", stacklevel=3
    )
    return config.replace(num_nextn_predict_layers=0)


def _check_names_and_shapes(reader: TensorFiles, bindings: list[Binding], shapes: dict[str, torch.Size]) -> None:
    wanted = {name: shape for b in bindings for name, shape in zip(b.theirs, b.piece_shapes(shapes[b.ours]), strict=True)}
    unexpected = [name for name in reader.names() if name not in wanted and not RECOMPUTED.search(name)]
    scales = [name for name in unexpected if name.endswith(("qweight", "weight_packed"))]
    if scales:
        raise UserError(
            "checkpoints quantised to integers are not supported",
            where=reader.folder,
            value=scales[0],
            expected="BF16, FP16, FP32 or FP8 weights",
        )
    missing = [name for name in wanted if name not in reader]
    if missing:
        raise UserError(
            "config.json contradicts the weights: a tensor is missing",
            where=f"{missing[0]} in {reader.folder}",
            value=f"absent{_and_others(missing)}",
            expected=list(wanted[missing[0]]),
            nearest=nearest(missing[0], unexpected),
        )
    if unexpected:
        raise UserError(
            "config.json contradicts the weights: a tensor is not part of the model",
            where=f"{unexpected[0]} in {reader.folder}",
            value=f"{list(reader.shape(unexpected[0]))}{_and_others(unexpected)}",
            nearest=nearest(unexpected[0], wanted),
        )
    for name, shape in wanted.items():
        if reader.shape(name) != tuple(shape):
            raise UserError(
                "config.json contradicts the weights: wrong shape",
                where=f"{name} in {reader.folder}",
                value=list(reader.shape(name)),
                expected=list(shape),
            )
        if not reader.dtype(name).is_floating_point or reader.dtype(name).itemsize < 2:
            raise UserError(
                "unsupported weight dtype",
                where=f"{name} in {reader.folder}",
                value=reader.dtype(name),
                expected="BF16, FP16, FP32 or FP64",
            )


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("expert_bias") and dtype != torch.float64 else dtype


def _stored_dtype(reader: TensorFiles, bindings: list[Binding]) -> torch.dtype:
    """The dtype of most values; a warning when wider ones have to be rounded."""
    values: Counter[torch.dtype] = Counter()
    for name in (name for b in bindings if not b.ours.endswith("expert_bias") for name in b.theirs):
        values[reader.dtype(name)] += math.prod(reader.shape(name))
    common = values.most_common(1)[0][0]
    wider = [str(d).removeprefix("torch.") for d in values if torch.promote_types(d, common) != common]
    if wider:
        warnings.warn(f"{reader.folder}: {', '.join(wider)} tensors are rounded to {common}; pass dtype to choose", stacklevel=3)
    return common


def read_binding(opened: Opened, name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """One of our tensors, assembled from its pieces, in `dtype` or the folder's; non-finite values are refused."""
    binding, reader = opened.bindings[name], opened.reader
    out = torch.empty(shape, dtype=_dtype_of(name, dtype or opened.stored), device=device)
    for piece_name, target in zip(binding.theirs, binding.split(out), strict=True):
        target.copy_(finite(reader.read(piece_name), f"{piece_name} in {reader.folder}"))
    return out


def finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor itself; a `UserError` where it holds NaN or infinite values."""
    # Both extremes are finite only if every value is, and no mask of the tensor's size is needed. They are looked at one by
    # one: this also runs in a walk's autocast, whose stack and cat on a CPU refuse FP16.
    if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        found = f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values"
        raise UserError("the weights hold NaN or infinite values", where=where, value=found, expected="finite numbers")
    return tensor


def check_tied(opened: Opened) -> None:
    """A `UserError` where embeddings are tied and another head is stored; for who reads tensors one by one."""
    names = (LM_HEAD, EMBEDDINGS) if opened.config.tie_word_embeddings and LM_HEAD in opened.bindings else ()
    _check_tied({n: read_binding(opened, n, opened.shapes[n], torch.device("cpu")) for n in names}, opened.folder)


def _check_tied(state: dict[str, Tensor], folder: Path) -> None:
    if LM_HEAD in state and not torch.equal(state[LM_HEAD], state[EMBEDDINGS]):
        raise UserError(
            "config.json contradicts the weights: tied embeddings, but another LM head is stored",
            where=f"tie_word_embeddings in {folder / 'config.json'}",
            value=True,
            expected="false, or no lm_head.weight",
        )
