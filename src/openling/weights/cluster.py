"""The exact command with which SGLang or vLLM serves a folder, and why an engine cannot run one that it would misread.

What the engines read is in docs/serving.md, with the versions it was read from. Both compute Ling-2.6's layout only, drop tensors
they do not know without a word, and keep other defaults than the checkpoint means; so what differs is written out or refused.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openling.errors import UserError
from openling.model.config import LING_ARCHITECTURE, ModelConfig
from openling.model.families import read_config

EngineName = Literal["sglang", "vllm"]
ENGINES: tuple[EngineName, ...] = ("sglang", "vllm")
# The versions whose sources the flags were checked against; assumed where the engine is not installed.
READ_VERSIONS: dict[EngineName, str] = {"sglang": "0.5.23", "vllm": "0.33.0"}
DRAFT_STEPS = 3
# Weights per GPU that leave an 80 GB card room for caches.
_GPU_WEIGHT_BYTES = 56 << 30
ToolFormat = Literal["json", "xml", "none"]
_TOOL_PARSERS: dict[EngineName, dict[ToolFormat, str]] = {
    "sglang": {"json": "qwen25", "xml": "glm"},
    "vllm": {"json": "hermes", "xml": "glm45"},
}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder tells about itself without its weights being read.

    mtp_layers: MTP layers whose tensors are there. stale: whether its shards hold tensors that its index does not promise.
    """

    config: ModelConfig
    hf: dict[str, Any]
    chat_template: str
    weight_bytes: int
    mtp_layers: int
    stale: bool = False

    @property
    def hybrid(self) -> bool:
        """Whether this is a Ling-2.5/2.6 folder; anything else needs no flags of ours."""
        return self.hf.get("architectures") == [LING_ARCHITECTURE]


def describe(
    hf: dict[str, Any], chat_template: str, tensor_names: list[str], weight_bytes: int, *, stale: bool = False
) -> Checkpoint:
    """A `Checkpoint` from a config.json, the chat template's text and the names of the tensors."""
    config = read_config(hf)
    layers = {int(found[1]) for name in tensor_names if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    extra = [layer for layer in layers if layer >= config.num_hidden_layers]
    return Checkpoint(config, hf, chat_template, weight_bytes, len(extra), stale)


def valid_tensor_parallel(checkpoint: Checkpoint) -> list[int]:
    """Tensor-parallel sizes an engine accepts. A rank holds whole norm groups, heads, and equal parts of the MLPs."""
    c = checkpoint.config
    widths = [c.num_attention_heads]
    widths += [c.group_norm_size] if "lightning" in c.layer_kinds else [c.num_key_value_heads]
    widths += [width for width in (c.intermediate_size, c.moe_intermediate_size) if width]
    most = math.gcd(*widths)
    return [size for size in range(1, most + 1) if most % size == 0]


def default_tensor_parallel(checkpoint: Checkpoint) -> int:
    """The smallest valid size with which the weights leave an 80 GB card room, else the largest."""
    sizes = valid_tensor_parallel(checkpoint)
    return next((size for size in sizes if checkpoint.weight_bytes / size <= _GPU_WEIGHT_BYTES), sizes[-1])


def check_tensor_parallel(checkpoint: Checkpoint, size: int) -> None:
    """Raises UserError for a size that the model cannot be split into."""
    sizes = valid_tensor_parallel(checkpoint)
    if size not in sizes:
        c = checkpoint.config
        of = f"group_norm_size {c.group_norm_size}" if "lightning" in c.layer_kinds else f"{c.num_key_value_heads} KV heads"
        raise UserError(
            "the model cannot be split over that many GPUs",
            where="--tp",
            value=size,
            expected=f"one of {', '.join(map(str, sizes))} (a divisor of {of}, the heads and the MLP widths)",
            nearest=min(sizes, key=lambda other: (abs(other - size), -other)),
        )


def check_engine(checkpoint: Checkpoint, engine: EngineName) -> None:
    """Raises UserError when `engine` would refuse the model, or run it as another model than it is."""
    if checkpoint.stale:
        raise UserError(
            f"{engine} cannot serve a linked folder: it loads whole shards, and these hold tensors that were replaced",
            where="stale_in of the shards' index",
            expected="a folder whose shards hold nothing else",
            next="openling convert MODEL CLEAN --to hf",
        )
    if not checkpoint.hybrid:
        return
    for what, where, value, expected in _obstacles(checkpoint, engine):
        raise UserError(
            f"{engine} cannot serve this model: {what}",
            where=f"{where} in config.json",
            value=value,
            expected=expected,
            next="openling serve MODEL (our own engine runs it)",
        )


def _obstacles(checkpoint: Checkpoint, engine: EngineName) -> list[tuple[str, str, object, str]]:
    """(what, key, value, expected) of everything in the way."""
    c, hf = checkpoint.config, checkpoint.hf
    found: list[tuple[str, str, object, str]] = []

    def need(ok: bool, what: str, where: str, value: object, expected: str) -> None:
        if not ok:
            found.append((what, where, value, expected))

    group = c.layer_group_size or 0
    rule = tuple("mla" if group and (i + 1) % group == 0 else "lightning" for i in range(c.num_hidden_layers))
    what = "it reads the layers' kinds from layer_group_size alone"
    shape = f"{c.num_hidden_layers} layers in groups of {group or 'no size'}: {_kinds(c)}"
    need(
        bool(group) and c.num_hidden_layers % group == 0 and c.layer_kinds == rule,
        what,
        "layer_kinds",
        shape,
        "Lightning, and MLA last in each whole group",
    )
    biases = [name for name in ("use_qkv_bias", "use_bias", "mlp_bias") if getattr(c, name)]
    what = "it drops the biases of MLA layers and MLPs without a word"
    need(not biases, what, ", ".join(biases), True, "false")
    what = "it computes decays with offset 0"
    need(not c.lightning_decay_offset, what, "lightning_decay_offset", c.lightning_decay_offset, "0")
    what = "it makes every layer from first_k_dense_replace on sparse"
    need("moe_layers" not in hf, what, "moe_layers", hf.get("moe_layers"), "absent")
    if c.moe_layers:
        both = (c.score_function, c.moe_router_enable_expert_bias)
        what = "its router is softmax without, or sigmoid with an expert bias"
        need(both in (("softmax", False), ("sigmoid", True)), what, "score_function", both[0], "sigmoid and expert biases")
        width = c.moe_intermediate_size * c.num_shared_experts
        ok = engine == "vllm" or not c.num_shared_experts or c.moe_shared_expert_intermediate_size == width
        what = "it takes moe_intermediate_size for the shared experts too"
        stored = hf.get("moe_shared_expert_intermediate_size")
        need(ok, what, "moe_shared_expert_intermediate_size", stored, str(c.moe_intermediate_size))
    kind = (c.rope_scaling or {}).get("rope_type", "default")
    yarn = engine == "vllm" or kind in ("default", "yarn")
    need(yarn, "its MLA layers take any RoPE scaling for YaRN", "rope_scaling.rope_type", kind, "yarn, or no scaling")
    power = engine == "sglang" or c.head_dim & (c.head_dim - 1) == 0
    need(power, "its Lightning kernel needs a power of two", "head_dim", c.head_dim, "a power of two")
    return found


def _kinds(c: ModelConfig) -> str:
    return ", ".join(f"{c.layer_kinds.count(kind)} {kind}" for kind in dict.fromkeys(c.layer_kinds))


@dataclass(frozen=True)
class Launch:
    """What the user chose. `version`: the installed engine's, or the one that the flags were checked against.

    dtype: of weights and activations; auto is the folder's in both engines.
    """

    tp: int
    host: str = "127.0.0.1"
    port: int = 8000
    max_model_len: int | None = None
    dtype: str = "auto"
    version: str = ""


def command(engine: EngineName, checkpoint: Checkpoint, model: str, launch: Launch) -> list[str]:
    """The words of the command that serves `model`, checked. Raises UserError when it cannot be served so."""
    check_engine(checkpoint, engine)
    check_tensor_parallel(checkpoint, launch.tp)
    words = (_sglang if engine == "sglang" else _vllm)(checkpoint, model, launch)
    return words + (["--dtype", launch.dtype] if launch.dtype != "auto" else [])


def _sglang(checkpoint: Checkpoint, model: str, launch: Launch) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--host", launch.host, "--port", str(launch.port)]
    words += ["--tp-size", str(launch.tp)]
    if checkpoint.hybrid:
        words += ["--trust-remote-code", "--mamba-ssm-dtype", "float32"]
    words += _flag("--tool-call-parser", _TOOL_PARSERS["sglang"].get(tool_format(checkpoint)))
    words += _flag("--reasoning-parser", "deepseek-r1" if thinks(checkpoint) else None)
    if drafts(checkpoint):
        # Chains only: the Lightning backend has no tree verification. extra_buffer keeps overlap scheduling.
        words += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(DRAFT_STEPS)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(DRAFT_STEPS + 1)]
        renamed = _version(launch.version or READ_VERSIONS["sglang"]) >= (0, 5, 23)
        words += ["--mamba-radix-cache-strategy" if renamed else "--mamba-scheduler-strategy", "extra_buffer"]
    if launch.max_model_len:
        words += ["--context-length", str(launch.max_model_len)]
        words += _override("--json-model-override-args", checkpoint, launch.max_model_len)
    return words


def _vllm(checkpoint: Checkpoint, model: str, launch: Launch) -> list[str]:
    words = ["vllm", "serve", model, "--host", launch.host, "--port", str(launch.port)]
    words += ["--tensor-parallel-size", str(launch.tp)]
    if checkpoint.hybrid:
        # Its "auto" is the model's dtype, and a BF16 state drifts.
        words += ["--trust-remote-code", "--mamba-cache-dtype", "float32"]
    parser = _TOOL_PARSERS["vllm"].get(tool_format(checkpoint))
    words += ["--enable-auto-tool-choice", "--tool-call-parser", parser] if parser else []
    words += _flag("--reasoning-parser", "deepseek_r1" if thinks(checkpoint) else None)
    if drafts(checkpoint):
        speculative = {"method": "mtp", "num_speculative_tokens": DRAFT_STEPS}
        words += ["--speculative-config", json.dumps(speculative)]
    if launch.max_model_len:
        words += ["--max-model-len", str(launch.max_model_len)]
        words += _override("--hf-overrides", checkpoint, launch.max_model_len)
    return words


def _flag(name: str, value: str | None) -> list[str]:
    return [name, value] if value else []


def _override(flag: str, checkpoint: Checkpoint, length: int) -> list[str]:
    """YaRN for a context beyond the checkpoint's own, over its original length."""
    c = checkpoint.config
    if length <= c.max_position_embeddings:
        return []
    if c.rope_scaling and c.rope_scaling.get("rope_type") != "yarn":
        raise UserError(
            "the context cannot be extended over another RoPE scaling",
            where="--max-model-len",
            value=length,
            expected=f"at most {c.max_position_embeddings}",
        )
    scaling = dict(c.rope_scaling or {})
    original = scaling.get("original_max_position_embeddings") or c.max_position_embeddings
    scaling |= {"rope_type": "yarn", "factor": length / original, "original_max_position_embeddings": original}
    # SGLang takes its limit from max_position_embeddings whenever the original length is given.
    return [flag, json.dumps({"rope_scaling": scaling, "max_position_embeddings": length})]


def drafts(checkpoint: Checkpoint) -> bool:
    """Whether both engines can draft with the model's MTP layer: exactly one, MLA and sparse, with its tensors there."""
    c = checkpoint.config
    one = c.num_nextn_predict_layers == 1 and checkpoint.mtp_layers == 1
    return checkpoint.hybrid and one and c.mtp_layer_kind == "mla" and c.is_moe(c.num_hidden_layers)


def tool_format(checkpoint: Checkpoint) -> ToolFormat:
    """How the chat template has tools called: Ling's JSON in `<tool_call>`, Ring's XML with `<arg_key>`, or not at all."""
    template = checkpoint.chat_template
    if "<tool_call>" not in template:
        return "none"
    return "xml" if "<arg_key>" in template else "json"


def thinks(checkpoint: Checkpoint) -> bool:
    """Whether replies always begin with thinking, as Ring's: only then does a reasoning parser not swallow tool calls."""
    return "reasoning_effort" in checkpoint.chat_template


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def launch_script(engine: EngineName, checkpoint: Checkpoint) -> str:
    """`launch_sglang.sh` or `launch_vllm.sh` of an exported folder; more flags of the engine may follow its name."""
    name = {"sglang": "SGLang", "vllm": "vLLM"}[engine]
    head = f"#!/bin/sh\n# Serves this folder with {name}; flags checked against {READ_VERSIONS[engine]}. Written by openling.\n"
    try:
        words = command(engine, checkpoint, "MODEL", Launch(tp=default_tensor_parallel(checkpoint)))
    except UserError as error:
        reason = str(error).replace("\n", "\n# ")
        return f"{head}# {reason}\necho {shlex.quote(error.what)} >&2\nexit 2\n"
    lines = " \\\n  ".join(_lines(words)).replace("MODEL", '"$(dirname -- "$0")"', 1)
    sizes = ", ".join(map(str, valid_tensor_parallel(checkpoint)))
    return f'{head}# Tensor-parallel sizes that fit: {sizes}.\nexec {lines} "$@"\n'


def _lines(words: list[str]) -> list[str]:
    """A flag and its values to a line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]


def read_checkpoint(folder: Path) -> Checkpoint:
    """A `Checkpoint` from a folder on disk."""
    from openling.weights.io import CheckpointReader, checked_folder, read_hf_config

    folder = checked_folder(folder)
    reader = CheckpointReader(folder)
    stale = bool(reader.stale_in)
    return describe(read_hf_config(folder), chat_template(folder), reader.names(), reader.total_bytes, stale=stale)


def chat_template(folder: Path) -> str:
    """The text of a folder's chat template; empty where there is none."""
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8", errors="replace")
    stored = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    if isinstance(stored, list):  # named templates
        stored = next((each.get("template") for each in stored if each.get("name") == "default"), None)
    return stored or ""
