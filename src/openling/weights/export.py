"""`save`: a model as a complete Hugging Face folder that transformers and serving engines load with no extra step.

A model that is still what its source's config.json says goes back under the source's own family, names and config, bit
for bit. Everything else becomes a Ling-2.5/2.6 folder with our own remote-code file.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from openling import __version__
from openling.errors import UserError
from openling.model.config import LING_ARCHITECTURE, LING_MODEL_TYPE, ModelConfig, write_ling
from openling.model.families import family_of
from openling.model.ling import Ling
from openling.weights.cluster import ENGINES, chat_template, describe, launch_script
from openling.weights.folder import EMBEDDINGS, LM_HEAD, TOKENIZER_CONFIG, TOKENIZER_FILES, load_tokenizer
from openling.weights.io import SHARD_BYTES, CheckpointReader, FolderWriter, checked_folder, read_hf_config, read_json
from openling.weights.names import Binding, bind
from openling.weights.remote import AUTO_MAP, REMOTE_FILE, remote_code

_LICENSES = ("LICENSE*", "NOTICE*")


def save(
    model: Ling,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    source: str | Path | None = None,
    hf_config: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    name: str | None = None,
    companions: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model` to the new folder `out`, which appears whole or not at all; returns its path.

    dtype: of all written weights (the router's selection bias stays FP32); None keeps the source's, or else the model's.
    source: the folder this model came from; its tokenizer, chat template, generation config and licence are copied, and
    it is never changed. hf_config: the source's config.json (read from `source` when left out). provenance: what the
    model card and `openling.json` tell about the model's making.
    name: the model card's title, by default the folder's. companions: where tokenizer and template come from, if not from
    `source`. Raises UserError when `out` exists or cannot be written.
    """
    source = checked_folder(source) if source is not None else None
    hf_config = read_hf_config(source) if hf_config is None and source is not None else hf_config
    same = hf_config is not None and _is_still(model.config, hf_config)
    tensors = _source_tensors(model, hf_config, source, dtype) if same and hf_config else _ling_tensors(model, dtype)
    total = sum(t.numel() * d.itemsize for _, t, d in tensors)
    config = _same_config(hf_config, dtype) if same and hf_config else _ling_config(model, tensors)
    if not same and "lightning" in model.config.layer_kinds and model.config.lightning_decay_offset:
        warnings.warn("lightning_decay_offset is not 0: SGLang and vLLM ignore it and compute other decays", stacklevel=2)
    writer = FolderWriter(out, shard_bytes=shard_bytes, expected_bytes=total + (16 << 20))
    with writer:
        for key, tensor, stored in tensors:
            writer.add(key, tensor.detach().to(stored))
        writer.add_file("config.json", json_text(config))
        if not same:
            writer.add_file(REMOTE_FILE, remote_code())
        add_companions(writer, Path(companions) if companions is not None else source, model.config)
        record = {"openling_version": __version__, "base_model": source.name if source else None, **(provenance or {})}
        writer.add_file("openling.json", json_text(record))
        add_launch_scripts(writer, config, source, [name for name, _, _ in tensors], total)
        writer.add_file("README.md", model_card(name or writer.out.name, config, source, record))
    return writer.out


class FileSink(Protocol):
    """What takes the small files of a folder: `FolderWriter`, or a folder that is filled in another way."""

    def add_file(self, name: str, data: str | bytes) -> None:
        """Write a small file of the folder."""


# A tensor to write: its name in the checkpoint, its values, the dtype to store.
Entry = tuple[str, Tensor, torch.dtype]


def _is_still(config: ModelConfig, hf_config: dict[str, Any]) -> bool:
    """Whether the source's config.json describes this model (up to MTP layers that its weights lack)."""
    described = family_of(hf_config).read(hf_config)
    all_gqa = set(config.layer_kinds) == {"gqa"} and hf_config.get("architectures") != [LING_ARCHITECTURE]
    return all_gqa and described.replace(num_nextn_predict_layers=config.num_nextn_predict_layers) == config


def _entries(bindings: list[Binding], state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for binding in bindings:
        yield from zip(binding.theirs, binding.split(state[binding.ours]), strict=True)


def _source_tensors(model: Ling, hf: dict[str, Any], source: Path | None, dtype: torch.dtype | None) -> list[Entry]:
    """Under the source's family; names and dtypes as the source's weights have them, where there are any."""
    reader = CheckpointReader(source) if source is not None else None
    state = model.state_dict()
    bindings = bind(family_of(hf).architecture, model.config, state, present=reader)
    # FP8 is stored with scales, which this does not write: such a source goes back in the model's dtype.
    known = {n: reader.dtype(n) for n in reader.names() if reader.dtype(n).itemsize > 1} if reader is not None else {}
    return [(name, t, _stored(name, t, dtype) if dtype else known.get(name, t.dtype)) for name, t in _entries(bindings, state)]


def _ling_tensors(model: Ling, dtype: torch.dtype | None) -> list[Entry]:
    """Under Ling's names. A tied LM head is written out, because engines cannot tie this family."""
    state = model.state_dict()
    state[LM_HEAD] = state[EMBEDDINGS] if model.config.tie_word_embeddings else state[LM_HEAD]
    bindings = bind(LING_ARCHITECTURE, model.config.replace(tie_word_embeddings=False), state)
    return [(name, t, _stored(name, t, dtype)) for name, t in _entries(bindings, state)]


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return tensor.dtype if dtype is None or name.endswith(("expert_bias", "e_score_correction_bias")) else dtype


def _same_config(hf_config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config as it was; only a new dtype is noted in it, and that nothing is quantised."""
    hf_config = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    return hf_config if dtype is None else hf_config | {key: dtype_name(dtype)}


def _ling_config(model: Ling, tensors: list[Entry]) -> dict[str, Any]:
    return ling_config(model.config, next(stored for name, _, stored in tensors if name == EMBEDDINGS))


def ling_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a Ling-2.5/2.6 folder of ours."""
    names = {"dtype": dtype_name(dtype), "torch_dtype": dtype_name(dtype)}
    return write_ling(config.replace(tie_word_embeddings=False)) | names | {"auto_map": AUTO_MAP}


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it."""
    return str(dtype).removeprefix("torch.")


def json_text(value: dict[str, Any]) -> str:
    """As the folder's JSON files are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def add_companions(writer: FileSink, source: Path | None, config: ModelConfig) -> None:
    """Tokenizer, chat template, generation config, licence."""
    if source is not None:
        licences = [p.name for pattern in _LICENSES for p in source.glob(pattern) if p.is_file()]
        found = {n: (source / n).read_bytes() for n in (*TOKENIZER_FILES, *licences) if (source / n).is_file()}
        if (settings := _tokenizer_config_with_class(source)) is not None:
            found[TOKENIZER_CONFIG] = json_text(settings).encode()
        for name, data in found.items():
            writer.add_file(name, data)
    if source is not None and (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
    else:
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {key: value for key, value in ids.items() if value is not None}
    writer.add_file("generation_config.json", json_text(generation))


def _tokenizer_config_with_class(source: Path) -> dict[str, Any] | None:
    """tokenizer_config.json with the class that transformers takes for the source, where a hybrid's folder would get another.

    For some model types (qwen2) transformers sets aside the class that the folder names, and splits text otherwise.
    """
    path = source / TOKENIZER_CONFIG
    if not (path.is_file() and (source / "config.json").is_file()):
        return None
    try:
        settings, config = read_json(path), read_json(source / "config.json")
    except UserError:  # a tokenizer that cannot be read is copied as it is
        return None
    if config.get("model_type") == LING_MODEL_TYPE:
        return None
    loaded = _tokenizer_class(source)
    if loaded in (None, settings.get("tokenizer_class")):
        return None
    with tempfile.TemporaryDirectory() as bare:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (Path(bare) / name).symlink_to((source / name).resolve())
        (Path(bare) / "config.json").write_text(json.dumps({"model_type": LING_MODEL_TYPE}))
        alike = _tokenizer_class(Path(bare)) == loaded
    return None if alike else settings | {"tokenizer_class": loaded}


def _tokenizer_class(folder: Path) -> str | None:
    """Of what transformers loads from there; None where it cannot be read."""
    try:
        return type(load_tokenizer(folder)).__name__
    except UserError:
        return None


def add_launch_scripts(
    writer: FileSink, config: dict[str, Any], source: Path | None, names: list[str], total: int, *, stale: bool = False
) -> None:
    """How SGLang and vLLM serve the folder, or why they cannot; stale: shards hold more than the index promises."""
    template = chat_template(source) if source is not None else ""
    checkpoint = describe(config, template, names, total, stale=stale)
    for engine in ENGINES:
        writer.add_file(f"launch_{engine}.sh", launch_script(engine, checkpoint))


def model_card(name: str, config: dict[str, Any], source: Path | None, record: dict[str, Any]) -> str:
    """A short model card: what this is, what it was made from, how to load it."""
    licence = licence_of(source)
    matter = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [openling]"]
    matter += [f"license: {licence}"] if licence else []
    remote = "auto_map" in config
    kinds = config.get("layer_kinds")
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) if kinds else config["num_hidden_layers"]
    rows = [("architecture", config["architectures"][0]), ("layers", layers)]
    rows += [(key.replace("_", " "), value) for key, value in record.items() if value is not None]
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    argument = ", trust_remote_code=True" if remote else ""
    return (
        "---\n" + "\n".join(matter) + f"\n---\n\n# {name}\n\nWritten by openling.\n\n| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{argument})\n```\n'
    )


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")


def licence_of(source: Path | None) -> str | None:
    """The `license:` line of the source's model card."""
    if source is None or not (source / "README.md").is_file():
        return None
    found = re.search(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---", (source / "README.md").read_text(errors="replace"), re.S | re.M)
    return found[1] if found else None
