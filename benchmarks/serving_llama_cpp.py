"""Decoding beside llama.cpp on a CPU: SmolLM2-135M, the same weights in the same precision, one sequence, short context.

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36   # built for this processor: needs CMake, C++
    python benchmarks/serving_llama_cpp.py --peer LLAMA/bin/python [--threads 2] [--turns 7] [--tokens 128]

llama.cpp stays in its own environment: this script starts itself there as a child that answers one line per turn. Turns alternate
and medians count, so that both sides meet the same machine. Greedy on both sides; what they wrote is compared too. Writes
benchmarks/results/serving/llama-cpp.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "serving" / "llama-cpp.json"
PROMPT = "The history of the printing press begins in"
DTYPES = ("float32", "bfloat16")
GOAL = 0.85  # within 15 %
# From a profile on a processor without AVX-512.
WHY = (
    "PyTorch's product of one row reads 11 to 19 GB/s here (llama.cpp's whole token 20), and, by estimate, "
    "the calls between products cost the rest"
)


# -- llama.cpp, in its own environment: nothing of ours is imported here ----------------------------------------------------


def answer_turns(model: str, threads: int) -> None:
    """Read {"prompt": ids, "tokens": n} per line; write {"seconds": of n tokens after the first, "ids": [...]}."""
    import llama_cpp as llama

    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    loaded = llama.llama_model_load_from_file(model.encode(), params)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 512, threads, threads
    context = llama.llama_init_from_model(loaded, settings)
    greedy = llama.llama_sampler_init_greedy()
    print(json.dumps({"version": llama.__version__, "system": llama.llama_print_system_info().decode()}), flush=True)

    def decode(ids: list[int]) -> int:
        tokens = (llama.llama_token * len(ids))(*ids)
        assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids))) == 0
        return llama.llama_sampler_sample(greedy, context, -1)

    for line in sys.stdin:
        asked = json.loads(line)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        ids = [decode(asked["prompt"])]
        begun = time.perf_counter()
        while len(ids) <= asked["tokens"]:
            ids.append(decode(ids[-1:]))
        print(json.dumps({"seconds": time.perf_counter() - begun, "ids": ids}), flush=True)


class Peer:
    """llama.cpp on one file."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        command = [python, __file__, "--answer", str(model), "--threads", str(threads)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True)
        self.about = self._read()

    def run(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        """Seconds, and what was written."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._child.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["ids"]

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.wait()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp did not start: is llama-cpp-python installed where --peer points?")
        found: dict[str, Any] = json.loads(line)
        return found


# -- ours ------------------------------------------------------------------------------------------------------------------


class Ours:
    """The serving engine on one folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        from openling.serve.engine import Engine
        from openling.serve.engine_config import EngineConfig
        from openling.weights.dtype import DTYPES as TORCH
        from openling.weights.folder import load

        loaded = load(folder, dtype=TORCH[dtype], device=torch.device("cpu"))
        self.tokenizer = loaded.tokenizer
        self.engine = Engine(loaded.model, None, EngineConfig(max_running=8, max_model_len=512, prefix_cache=False))

    def run(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        """Seconds, and what was written."""
        from openling.serve.types import Request, SamplingParams

        engine = self.engine
        engine.add(Request("r", tuple(prompt), SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)))
        ids: list[int] = []
        begun = 0.0
        while engine.has_work():
            for output in engine.step():
                ids += output.token_ids
            begun = begun or time.perf_counter()
        return time.perf_counter() - begun, ids


def write_gguf(path: Path, dtype: str) -> None:
    """The package's SmolLM2 with its matrices dequantised, as llama.cpp reads it; vectors stay FP32 as llama.cpp has them."""
    import gguf
    import numpy as np
    from gguf.quants import dequantize, quantize

    from openling.weights.gguf import smollm2_gguf

    reader = gguf.GGUFReader(smollm2_gguf())
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        of, *inner = field.types
        writer.add_key_value(name, field.contents(), of, sub_type=inner[-1] if inner else None)
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    writer.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}[dtype])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(dtype: str, peer: Peer, ours: Ours, turns: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of both, in turns."""
    prompt = ours.tokenizer(PROMPT).input_ids
    sides: tuple[Peer | Ours, ...] = (peer, ours)
    written = [side.run(prompt, tokens)[1] for side in sides]  # also warms up
    times: list[list[float]] = [[], []]
    for _ in range(turns):
        for side, seconds in zip(sides, times, strict=True):
            seconds.append(side.run(prompt, tokens)[0])
    theirs, own = (tokens / statistics.median(seconds) for seconds in times)
    agree = next((i for i, (a, b) in enumerate(zip(*written, strict=True)) if a != b), tokens + 1)
    spread = [[round(tokens / s, 1) for s in (max(seconds), min(seconds))] for seconds in times]
    print(f"{dtype}: ours {own:.1f} tokens/s {spread[1]}, llama.cpp {theirs:.1f} {spread[0]}, ratio {own / theirs:.2f};")
    print(f"  the first {agree} of {tokens + 1} tokens are the same", flush=True)
    return {
        "name": f"decode, SmolLM2-135M (GQA), {dtype}, batch 1, context {len(prompt)} to {len(prompt) + tokens}",
        "value": own,
        "unit": "tokens/s",
        "range": spread[1],
        "peer": "llama.cpp",
        "peer_value": theirs,
        "peer_range": spread[0],
        "ratio": own / theirs,
        "goal": f">= {GOAL}",
        "met": own / theirs >= GOAL,
        "same_tokens": agree,
    }


def main() -> None:
    """Both precisions; one row each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", default=sys.executable, help="python of the environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--dry-run", action="store_true", help="measure, write no results")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer_turns(args.answer, args.threads)
        return
    import torch

    from openling.environment import write_results
    from openling.weights.gguf import import_gguf, smollm2_gguf

    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = import_gguf(smollm2_gguf(), Path(place) / "smollm2")
        for dtype in args.dtypes:
            file = Path(place) / f"{dtype}.gguf"
            write_gguf(file, dtype)
            peer = Peer(args.peer, file, args.threads)
            try:
                rows.append(compare(dtype, peer, Ours(folder, dtype), args.turns, args.tokens))
            finally:
                peer.close()
            rows[-1] |= {} if rows[-1]["met"] else {"why": WHY}
            rows[-1] |= {"threads": args.threads, "peer_version": f"llama-cpp-python {peer.about['version']}"}
            if not args.dry_run:
                shown = ["LLAMA/bin/python" if word == args.peer else word for word in sys.argv[1:]]
                write_results(RESULTS, shlex.join(["python", "benchmarks/serving_llama_cpp.py", *shown]), rows)


if __name__ == "__main__":
    main()
