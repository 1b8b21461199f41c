"""`openling` as it is typed: verbs, `generate` and `chat` on good and bad folders, pipes and interrupts."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import openling
from openling.cli import VERBS, main
from openling.errors import UserError
from openling.model import generate

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # some tests fork
EOS = 256
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one token per byte and a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=260, num_key_value_heads=2, bos_token_id=None, eos_token_id=EOS, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def without(model: Path, folder: Path, *names: str) -> Path:
    shutil.copytree(model, folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return folder


def no_template(model: Path, folder: Path) -> Path:
    without(model, folder, "chat_template.jinja")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def refused(words: list[object], capsys: pytest.CaptureFixture[str], *said: str) -> None:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for part in said:
        assert part in captured.err


# ---------------------------------------------------------------------------------------------------------------------
# Verbs
# ---------------------------------------------------------------------------------------------------------------------


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["migrat", "a", "b"], capsys, "unknown command", "nearest:  migrate", *VERBS)
    for words, code in ((["--help"], 0), (["--version"], 0), ([], 2), (["--nonsense"], 2), *(([v, "--help"], 0) for v in VERBS)):
        with pytest.raises(SystemExit) as exited:
            main(words)
        assert exited.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from openling.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------------------------------
# generate
# ---------------------------------------------------------------------------------------------------------------------


def test_generate_prints_the_model_s_greedy_completion(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = openling.load(model)
    prompt = "hello"
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, loaded.model(ids)[:, -1:].argmax(-1)), dim=1)
    assert main(["generate", str(model), prompt, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == loaded.tokenizer.decode(ids[0, 5:], skip_special_tokens=True) + "\n"


def test_generate_reads_standard_input(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["generate", str(model), "from a pipe", "--max-new-tokens", "4"]) == 0
    typed = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert main(["generate", str(model), "-", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == typed
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused(["generate", model, "-"], capsys, "the prompt is empty")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([""], ["the prompt is empty"]),
        (["caf\udce9"], ["not UTF-8", "character 3"]),  # how Python hands over a byte that is not UTF-8
        (["hi", "--temperature", "-1"], ["temperature", "-1.0", "0 or more"]),
        (["hi", "--temperature", "nan"], ["temperature", "nan"]),
        (["hi", "--top-p", "0"], ["top_p"]),
        (["hi", "--top-k", "-1"], ["top_k"]),
        (["hi", "--max-new-tokens", "-1"], ["max_new_tokens"]),
        (["hi", "--seed", "1" + "0" * 30], ["seed", "64 bits"]),
        (["hi", "--max-new-tokenz", "3"], ["unknown argument", "nearest:  --max-new-tokens"]),
        (["hi", "--device", "gpu"], ["--device", "auto, cpu or cuda"]),
    ],
)
def test_generate_refuses(words: list[str], said: list[str], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["generate", model, *words], capsys, *said)


def test_generate_refuses_folders(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "model")
    refused(["generate", tmp_path / "modle", "hi"], capsys, "no such folder", f"nearest:  {tmp_path / 'model'}")
    bare = without(model, tmp_path / "bare", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    refused(["generate", bare, "hi"], capsys, "no tokenizer")
    refused(["generate", no_template(model, tmp_path / "plain"), "hi", "--chat"], capsys, "no chat template")


def test_a_stop_token_ends_a_huge_request(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third token chosen is the stop token; a billion were allowed."""
    chosen = iter([65, 66, EOS])
    monkeypatch.setattr(generate, "choose", lambda logits, *rest: torch.tensor([next(chosen)]))
    assert main(["generate", str(model), "hi", "--max-new-tokens", "1000000000"]) == 0
    assert capsys.readouterr().out == openling.load(model).tokenizer.decode([65, 66]) + "\n"
    assert main(["generate", str(model), "hi", "--max-new-tokens", "0"]) == 0
    assert capsys.readouterr().out == "\n"


def test_a_closed_pipe_is_no_error(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "openling.cli",
        "generate",
        str(model),
        "hi",
        "--max-new-tokens",
        "5000",
        "--temperature",
        "1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as p:
        assert p.stdout is not None
        assert p.stderr is not None
        assert p.stdout.read(5)
        p.stdout.close()
        said = p.stderr.read().decode().splitlines()
        assert [line[:5] for line in said] == ["Ops: "]
        assert p.wait() == 0


def test_interrupt(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "choose", lambda *args: signal.raise_signal(signal.SIGINT))  # to this thread, at once
    assert main(["generate", str(model), "hi"]) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Ops: ")
    assert said[1:] == ["openling: interrupted"]


def test_an_interrupt_that_an_import_makes_another_error_of(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """As numpy and torch do where Ctrl-C meets them half imported; without Ctrl-C the error stays what it is."""

    def half_imported(*args: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("module is half imported") from error

    monkeypatch.setattr(generate, "choose", half_imported)
    assert main(["generate", str(model), "hi"]) == 130
    assert capsys.readouterr().err.splitlines()[1:] == ["openling: interrupted"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(generate, "choose", lambda *args: (_ for _ in ()).throw(RuntimeError("mine")))
    with pytest.raises(RuntimeError, match="mine"):
        main(["generate", str(model), "hi"])


# ---------------------------------------------------------------------------------------------------------------------
# chat
# ---------------------------------------------------------------------------------------------------------------------


def test_chat_through_a_pipe(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n/new\nbad \udce9 byte\n"))
    assert main(["chat", str(model), "--max-new-tokens", "3", "--system", "be brief"]) == 0
    assert capsys.readouterr().out.count("\n> ") == 5
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nnever read\n"))
    assert main(["chat", str(model)]) == 0
    assert sys.stdin.readline() == "never read\n"


def test_chat_sends_the_whole_conversation(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = generate.prefill

    def spy(ling: object, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(openling.load(model).tokenizer.decode(ids[0]))
        return real(ling, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "prefill", spy)
    monkeypatch.setattr(generate, "choose", lambda *args: torch.tensor([EOS]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/new\nthree\n"))
    assert main(["chat", str(model), "--system", "S"]) == 0
    assert seen == [
        "system: S\nuser: one\nassistant: ",
        "system: S\nuser: one\nassistant: \nuser: two\nassistant: ",
        "system: S\nuser: three\nassistant: ",
    ]


def test_chat_interrupted_in_an_answer_goes_on(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([lambda: os.kill(os.getpid(), signal.SIGINT), lambda: None])

    def choose(*args: object) -> torch.Tensor:
        next(answers)()
        return torch.tensor([EOS])

    monkeypatch.setattr(generate, "choose", choose)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", str(model)]) == 0
    assert next(answers, None) is None


def test_chat_refuses(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["chat", no_template(model, tmp_path / "plain")], capsys, "no chat template", "openling generate")
    refused(["chat", model, "--temperature", "-1"], capsys, "temperature")


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------


def test_load_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    loaded = openling.load(without(model, tmp_path / "bare", "tokenizer.json", "tokenizer_config.json"))
    assert loaded.tokenizer is None
    logits = loaded.model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert (logits.dtype, logits.shape) == (torch.float32, (2, 3, 260))
    half = openling.load(model, dtype=torch.bfloat16).model(torch.tensor([[1, 2, 3]]))
    assert half.dtype == torch.float32
    with pytest.raises(UserError, match="no such folder"):
        openling.load(tmp_path / "nothing")


@pytest.mark.parametrize(("said", "told"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_wait_shortly_unless_the_environment_says_how(said, told, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "no such folder", "--prompt", "x"]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == told
