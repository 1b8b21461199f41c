"""lm-eval, guidellm and schemathesis against a live server: `make clients`. They live in .venv-clients and run as programs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import openling

sys.path.insert(0, str(Path(__file__).parents[1]))
from server_process import ADMIN_KEY, Served, served_nano  # noqa: E402

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROGRAMS = HERE.parents[2] / ".venv-clients" / "bin"
QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a kind of fish", "é"], "answer": 0},
    {"question": "Two\nand two make", "choices": ["four", "5", "many, many more than that"], "answer": 0},
    {"question": "Zwölf Boxkämpfer jagen", "choices": ["Viktor", "quer", "über den großen Sylter Deich 世界"], "answer": 1},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_nano(tmp_path_factory.mktemp("clients") / "nano", "--max-model-len", "512") as running:
        yield running


def program(name: str, *words: str, folder: Path, code: int = 0) -> str:
    """Run a client without any other network; its output."""
    env = {"PATH": f"{PROGRAMS}:/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    env |= {"HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "200", "OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([PROGRAMS / name, *words], capture_output=True, text=True, env=env, cwd=folder, timeout=900)
    assert run.returncode == code, run.stdout[-20000:] + run.stderr[-4000:]
    return run.stdout + run.stderr


def lm_eval(server: Served, folder: Path, kind: str, task: str, path: str, *words: str) -> list[dict]:
    """The samples that lm-eval logged for a task of this folder."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / f"{task}.yaml").write_text((HERE / f"{task}.yaml").read_text().replace("DATA", str(data)))
    arguments = f"model=nano,base_url={server.url}{path},tokenizer={server.model},num_concurrent=4,max_retries=1"
    words = ("--model", kind, "--model_args", arguments, "--tasks", f"openling_{task}", "--include_path", str(folder), *words)
    program("lm-eval", "run", *words, "--log_samples", "--output_path", str(folder / "out"), folder=folder)
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    return sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])


@torch.no_grad()
def test_lm_eval_loglikelihoods_are_the_models(server: Served, tmp_path: Path) -> None:
    samples = lm_eval(server, tmp_path, "local-completions", "questions", "/v1/completions", "--batch_size", "2")
    loaded = openling.load(server.model)
    for question, sample in zip(QUESTIONS, samples, strict=True):
        context = loaded.tokenizer(question["question"]).input_ids
        for choice, (found,) in zip(question["choices"], sample["resps"], strict=True):
            answer = loaded.tokenizer(" " + choice).input_ids
            logprobs = loaded.model(torch.tensor([context + answer]))[0, len(context) - 1 : -1].log_softmax(-1)
            expected = float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum())
            greedy = logprobs.argmax(-1).tolist() == answer
            # FP32 sums of at most 40 tokens, each within 1e-5 of the model in one piece.
            assert float(found[0]) == pytest.approx(expected, abs=4e-4)
            assert (str(found[1]) == "True") == greedy


def test_lm_eval_generates_over_chat(server: Served, tmp_path: Path) -> None:
    samples = lm_eval(server, tmp_path, "local-chat-completions", "writing", "/v1/chat/completions", "--apply_chat_template")
    assert len(samples) == len(QUESTIONS)
    assert all(isinstance(sample["resps"][0][0], str) and sample["resps"][0][0] for sample in samples)


def test_guidellm_measures_without_errors(server: Served, tmp_path: Path) -> None:
    words = ("--backend", f"kind=openai_http,target={server.url}", "--profile", "kind=concurrent,streams=8")
    words += ("--constraint", "kind=max_requests,count=24", "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16")
    words += ("--tokenizer", f"kind=hf_auto,model={server.model}", "--output", f"kind=json,path={tmp_path / 'out.json'}")
    program("guidellm", "run", *words, "--disable-console", folder=tmp_path)
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (24, 0)


def schemathesis(server: Served, folder: Path, *words: str) -> str:
    """Every route of the OpenAPI document: no 500, and statuses, types and bodies as documented."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
    words = (*words, "--checks", checks, "--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1")
    return program("schemathesis", "run", f"{server.url}/openapi.json", *words, "--request-timeout", "60", folder=folder)


def test_schemathesis_finds_nothing_without_the_admin_key(server: Served, tmp_path: Path) -> None:
    schemathesis(server, tmp_path)


@contextmanager
def going_on(server: Served) -> Iterator[None]:
    """Take every pause and every release of memory back soon: what stands still would answer nothing."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            for path in ("/resume_memory", "/resume"):
                request = urllib.request.Request(f"{server.url}{path}", b"{}", ADMIN | {"Content-Type": "application/json"})
                # 400: memory was released again between the two.
                with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60):
                    pass

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(go_on)
        try:
            yield
        finally:
            over.set()
        running.result()


def test_schemathesis_finds_nothing_with_the_admin_key(tmp_path: Path) -> None:
    """Pauses, aborts, releases and updates come in any order here, so this server is nobody else's. Its replies are short."""
    with served_nano(tmp_path / "nano", "--max-model-len", "64") as server, going_on(server):
        schemathesis(server, tmp_path, "--header", f"Authorization: {ADMIN['Authorization']}")
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
            assert answer.status == 200
