"""Conversions that are killed, shared, starved or lied to: one clear error each, nothing lost, resume gives the same hashes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import in_child
from stream_jobs import LING, hashes, job, settings, teacher, tensors

from openling.config.migrate import Text
from openling.errors import Failure, OpenlingError, UserError
from openling.migrate import stream
from openling.migrate.stream import convert_folder
from openling.migrate.verify import verify
from openling.ops.cpu import bf16_matmuls_pay, settle_bf16_matmuls
from openling.weights import files
from openling.weights.files import MANIFEST
from openling.weights.io import INDEX, CheckpointReader, FolderWriter

# The goal is 50: OPENLING_KILLS=50 pytest tests/migrate/test_stream_trouble.py -k killed
KILLS = int(os.environ.get("OPENLING_KILLS", "3"))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(scope="module", autouse=True)
def one_answer():
    """Runs that are compared must multiply alike; on a busy machine the self-test may answer this or that."""
    settle_bf16_matmuls(False)
    yield
    settle_bf16_matmuls(None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return teacher(tmp_path_factory.mktemp("source") / "teacher")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> tuple[dict[str, str], float]:
    """The hashes of an undisturbed conversion, and how long it takes in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "out"
    begun = time.monotonic()
    assert in_child(lambda: convert_folder(job(source, out), resume=False) and 0) == 0
    return hashes(out), time.monotonic() - begun


def wait_for(path: Path) -> None:
    """Until `path` is there."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.001)


def test_killed_anywhere_and_resumed(source, whole, tmp_path):
    expected, seconds = whole
    draw, unfinished = random.Random(0), 0
    for i in range(KILLS):
        out = tmp_path / str(i) / "out"
        out.parent.mkdir()
        child = os.fork()
        if child == 0:
            convert_folder(job(source, out), resume=False)
            os._exit(0)
        if i:
            time.sleep(draw.uniform(0.02, seconds))
        else:  # one that cannot have ended, however fast the machine
            wait_for(out.with_name("out.run") / "job.json")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += not out.exists()
        begun = out.with_name("out.run").joinpath("job.json").exists()
        assert in_child(lambda out=out, begun=begun: convert_folder(job(source, out), resume=begun) and 0) == 0
        assert {n for n, h in hashes(out).items() if expected.get(n) != h} == set()
        shutil.rmtree(out.parent)
    assert unfinished


def test_two_processes_share_a_conversion(source, whole, tmp_path):
    out, helpers = tmp_path / "out", []
    for k in range(2):
        helper = os.fork()
        if helper == 0:
            if k:
                wait_for(tmp_path / "out.run" / "job.json")
            report = convert_folder(job(source, out, text=False), resume=bool(k))
            (tmp_path / f"report-{k}.json").write_text(json.dumps(report))
            os._exit(0)
        helpers.append(helper)
    assert [os.waitpid(h, 0)[1] for h in helpers] == [0, 0]
    convert_folder(job(source, tmp_path / "alone", text=False), resume=False)
    different = {n for n, h in hashes(tmp_path / "alone").items() if hashes(out)[n] != h}
    assert different <= {"README.md"}  # its title is the folder's name
    assert {c.outcome for c in verify(source, out)} == {"ok"}


@pytest.mark.parametrize(("resume", "refusal"), [(False, "was begun"), (True, "settings have changed")])
def test_of_two_that_begin_at_once_one_does(source, tmp_path, monkeypatch, resume, refusal):
    """Both have seen an empty run folder; the second comes to write job.json when the first has."""
    out, first = tmp_path / "out", job(source, tmp_path / "out", text=False)
    second = job(source, out, text=False, config=settings(seed=1))
    (tmp_path / "out.run").mkdir()

    def meanwhile():
        monkeypatch.undo()
        monkeypatch.setattr(stream._Conversion, "go", lambda self: {})
        convert_folder(first, resume=False)
        return False

    monkeypatch.setattr(stream, "bf16_matmuls_pay", meanwhile)
    with pytest.raises(UserError, match=refusal):
        convert_folder(second, resume=resume)
    monkeypatch.undo()
    assert json.loads((tmp_path / "out.run" / "job.json").read_text())["settings"]["seed"] == 0
    convert_folder(first, resume=True)
    assert {c.outcome for c in verify(source, out)} == {"ok"}


@pytest.mark.parametrize("name", ["job.json", "done/layer-0.json", "done/walk-lightning.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\udcff"])
def test_a_broken_record_is_named(source, tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(stream._Conversion, "_fit_along", lambda *a: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        convert_folder(job(source, tmp_path / "out"), resume=False)
    path = tmp_path / "out.run" / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    if (name, text) == ("done/walk-lightning.json", "{}"):
        return  # a walk says nothing that anybody reads
    with pytest.raises(UserError, match="a record of this run is broken") as caught:
        convert_folder(job(source, tmp_path / "out"), resume=True)
    assert caught.value.parts["where"] == path
    assert caught.value.parts["next"] == f"remove {tmp_path / 'out.run'}, start again"


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("when", ["before it resumes", "before it publishes"])
@pytest.mark.parametrize("how", ["removed", "shorter", "flipped", "no draft", "unrecorded"])
def test_a_draft_that_is_not_as_it_was_left(source, whole, tmp_path, monkeypatch, how, when):
    """It is made again, and strangers are removed: the result is that of an undisturbed run, or there is none."""
    out, run = tmp_path / "out", tmp_path / "out.run"
    layer, publish = run / "draft" / "model-layer-00000.safetensors", stream._Conversion._publish
    monkeypatch.setattr(stream._Conversion, "_publish", lambda *a: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        convert_folder(job(source, out), resume=False)
    shard = min(p for p in (run / "draft").iterdir() if p != layer)

    def harm():
        (run / "draft" / "stranger.safetensors").write_text("x")
        (run / "draft" / "strangers").mkdir()
        if how == "no draft":
            shutil.rmtree(run / "draft")
        elif how == "unrecorded":
            (run / "done" / "layer-0.json").unlink()
        elif how == "flipped":
            flip(layer)
        else:
            for path in (shard, layer):
                path.unlink() if how == "removed" else shorten(path)

    monkeypatch.undo()
    if when == "before it resumes":
        harm()
    elif how == "flipped":
        pytest.skip("that is found when a run resumes, and by openling verify")
    else:
        once = [harm]
        monkeypatch.setattr(stream._Conversion, "_publish", lambda *a: (once and once.pop()(), publish(*a))[1])
    convert_folder(job(source, out), resume=True)
    assert hashes(out) == whole[0]


@pytest.mark.parametrize("where", ["before a file is moved", "after everything"])
def test_a_shard_that_changes_meanwhile(source, tmp_path, monkeypatch, where):
    model = shutil.copytree(source, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[1]
    original = shard.read_bytes(), shard.stat()

    def tamper(*args):
        with shard.open("r+b") as file:  # in place: it is being read
            file.seek(len(original[0]) - 5)
            file.write(bytes([original[0][-5] ^ 1]))
        os.utime(shard, ns=(original[1].st_atime_ns, original[1].st_mtime_ns))  # even so: found by hash

    target = "_fit_all" if where.startswith("before") else "_publish"
    step = getattr(stream._Conversion, target)
    monkeypatch.setattr(stream._Conversion, target, lambda self, *a: tamper() or step(self, *a))
    with pytest.raises(Failure, match="has changed on disk"):
        convert_folder(job(model, tmp_path / "out", text=False), resume=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(Failure, match="has changed on disk"):
        convert_folder(job(model, tmp_path / "out", text=False), resume=True)


def test_a_shard_that_changes_and_is_restored_leaves_no_trace(source, whole, tmp_path, monkeypatch):
    """What was fitted of the other bytes is not taken over by the run that goes on."""
    model, step = shutil.copytree(source, tmp_path / "teacher"), stream._Conversion._fit
    before = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in sorted(model.glob("*.safetensors"))}

    def fit(self, *args):
        for shard, (data, _) in before.items():
            shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return step(self, *args)

    monkeypatch.setattr(stream._Conversion, "_fit", fit)
    monkeypatch.setattr(stream._Conversion, "_move", lambda self, file: None)  # whose looks are its own
    with pytest.raises(Failure, match="has changed on disk"):
        convert_folder(job(model, tmp_path / "out"), resume=False)
    assert not list((tmp_path / "out.run" / "done").glob("layer-*"))
    monkeypatch.undo()
    for shard, (data, changed) in before.items():
        shard.write_bytes(data)
        os.utime(shard, ns=(changed, changed))
    convert_folder(job(model, tmp_path / "out"), resume=True)
    assert hashes(tmp_path / "out") == whole[0]


@pytest.mark.parametrize("where", ["mlp.experts.1.down_proj", "word_embeddings"])
def test_a_nan_is_named_by_its_tensor(source, tmp_path, where):
    """Also of what is read bit by bit: a routed expert, rows of the embeddings."""
    found = tensors(source)
    (name,) = [n for n in found if where in n and (".1." in n or "embed" in n)][:1]
    found[name][1] = math.nan
    with FolderWriter(tmp_path / "model", shard_bytes=20_000) as writer:
        for n, tensor in found.items():
            writer.add(n, tensor)
        writer.add_file("config.json", (source / "config.json").read_text())
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        convert_folder(job(tmp_path / "model", tmp_path / "out"), resume=False)
    assert name in caught.value.parts["where"]


def test_a_tied_model_with_another_head_is_refused_as_elsewhere(tmp_path):
    model = teacher(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another LM head is stored"):
        convert_folder(job(model, tmp_path / "out"), resume=False)
    assert not (tmp_path / "out.run").exists()


def test_verify_finds_what_was_tampered_with(source, tmp_path):
    convert_folder(job(source, tmp_path / "out"), resume=False)
    assert {c.outcome for c in verify(source, tmp_path / "out")} == {"ok"}

    def wrong(path, at):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        found = {c.name for c in verify(source, tmp_path / "out") if c.outcome == "wrong"}
        data[at] ^= 1
        path.write_bytes(data)
        return found

    out = tmp_path / "out"
    reader = CheckpointReader(out)
    span = reader.spans["model.layers.0.attention.query_key_value.weight"]
    both = {"files as they were written", "Lightning heads are the source's"}
    assert wrong(out / span.shard, span.start) == both
    span = reader.spans["model.norm.weight"]
    assert wrong(out / span.shard, span.start) == {"files as they were written", "untouched tensors identical"}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 17}))
    with pytest.raises(UserError, match="wrong shape"):
        verify(source, out)
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 5e4}))
    assert [(c.name, c.found.split(":")[0]) for c in verify(source, out) if c.outcome == "wrong"] == [
        ("files as they were written", "config.json")
    ]
    (out / "config.json").write_text(json.dumps(config))
    (out / MANIFEST).unlink()
    outcomes = {c.name: c.outcome for c in verify(source, out)}
    assert outcomes["files as they were written"] == "not run"
    assert outcomes["untouched tensors identical"] == outcomes["Lightning heads are the source's"] == "ok"
    tensors = load_file(out / "model-layer-00000.safetensors")
    tensors["model.layers.0.attention.query_key_value.weight"].neg_()
    save_file(tensors, out / "model-layer-00000.safetensors")
    heads = {c.name: c for c in verify(source, out)}["Lightning heads are the source's"]
    assert heads.outcome == "not run" and MANIFEST in heads.found and "trained since" not in heads.found


# Disks


@needs_root
def test_a_full_disk(source, whole, tmp_path):
    """A file system with room for nine tenths of the result."""
    size = sum(p.stat().st_size for p in source.iterdir()) * 9 // 10
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        with pytest.raises(UserError, match="no space left for the result"):
            convert_folder(job(source, place / "out"), resume=False)
        shutil.rmtree(place / "out.run", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "_check_space", lambda plan, run: None)  # it fills up meanwhile
            with pytest.raises(UserError, match="no space left while writing; what is done is kept"):
                convert_folder(job(source, place / "out"), resume=False)
        assert not (place / "out").exists()
        done = len(list((place / "out.run" / "done").iterdir()))
        assert done
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        convert_folder(job(source, place / "out"), resume=True)
        assert hashes(place / "out") == whole[0]
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
def test_a_source_on_a_read_only_mount(source, whole, tmp_path):
    place = tmp_path / "frozen"
    place.mkdir()
    subprocess.run(["mount", "--bind", source, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    try:
        for resume in (False, True):  # before it has begun, so that --copy may follow
            with pytest.raises(UserError, match="neither hard-linked nor reflinked"):
                convert_folder(job(place, tmp_path / "linked", mode="link"), resume=resume)
            assert not list((tmp_path / "linked.run").iterdir())
        convert_folder(job(place, tmp_path / "out"), resume=False)
        with pytest.raises(OpenlingError, match="cannot be written|only read"):
            convert_folder(job(source, place / "out"), resume=False)
    finally:
        subprocess.run(["umount", place], check=True)
    same_but = {n for n, h in hashes(tmp_path / "out").items() if whole[0][n] != h}
    assert same_but <= {"README.md", "openling.json", MANIFEST}  # they name the source's folder, and a hash of who does


# Bad sources and requests


def test_a_resumed_run_multiplies_as_it_began(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream._Conversion, "_publish", lambda *a: exec("raise KeyboardInterrupt"))
    settle_bf16_matmuls(True)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(job(source, tmp_path / "out", text=False), resume=False)
    monkeypatch.undo()
    settle_bf16_matmuls(False)
    convert_folder(job(source, tmp_path / "out", text=False), resume=True)
    assert bf16_matmuls_pay()
    settle_bf16_matmuls(False)


def test_mixed_dtypes_are_told_and_untouched_ones_kept(tmp_path):
    plain = teacher(tmp_path / "plain")
    reader = CheckpointReader(plain)
    with FolderWriter(tmp_path / "mixed", shard_bytes=20_000) as writer:
        for name in reader.names():
            writer.add(name, reader.read(name).to(torch.float32 if "layernorm" in name else torch.bfloat16))
        writer.add_file("config.json", (plain / "config.json").read_bytes())
    with pytest.warns(UserWarning, match="float32 tensors are rounded"):
        convert_folder(job(tmp_path / "mixed", tmp_path / "out", text=False), resume=False)
    found = tensors(tmp_path / "out")
    assert found["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert found["model.layers.0.attention.query_layernorm.weight"].dtype == torch.bfloat16


def test_a_tensor_in_two_shards(source, tmp_path):
    model = shutil.copytree(source, tmp_path / "model")
    index = json.loads((model / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    files.write_shard(model / "more.safetensors", {name: CheckpointReader(source).read(name), "x": torch.ones(1)})
    index["weight_map"]["x"] = "more.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="stored twice"):
        convert_folder(job(model, tmp_path / "out"), resume=False)
    assert not (tmp_path / "out.run").exists()


def test_requests_that_contradict_the_run(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nothing to resume"):
        convert_folder(job(source, out), resume=True)
    with pytest.raises(UserError, match="only read"):
        convert_folder(job(source, source / "out"), resume=False)
    convert_folder(job(source, out, text=False), resume=False)
    with pytest.raises(UserError, match="exists already"):
        convert_folder(job(source, out, text=False), resume=False)
    assert convert_folder(job(source, out, text=False), resume=True)["bytes of new layers"] > 0
    with pytest.raises(UserError, match="settings have changed"):
        convert_folder(job(source, out, text=False, config=settings(seed=1)), resume=True)
    longer = settings().model_copy(update={"text": Text(sequence_length=48, calibration_tokens=96)})  # so is its noise
    with pytest.raises(UserError, match="settings have changed[\\s\\S]*'sequence_length': 48"):
        convert_folder(job(source, out, text=False, config=longer), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_it_had_anything_begins(source, tmp_path, resume):
    """What a kill leaves that comes before job.json: drafts of it, and an empty folder for shards."""
    out, run = tmp_path / "out", tmp_path / "out.run"
    (run / "draft").mkdir(parents=True)
    (run / ".job.json.draft").write_text("{")
    (run / "mine.txt").write_text("")
    with pytest.raises(UserError, match="something else"):
        convert_folder(job(source, out, text=False), resume=resume)
    (run / "mine.txt").unlink()
    assert convert_folder(job(source, out, text=False), resume=resume)["bytes of new layers"] > 0


def test_a_config_that_changed_since_the_run_began(source, tmp_path):
    model, out = shutil.copytree(source, tmp_path / "model"), tmp_path / "out"
    convert_folder(job(model, out, text=False), resume=False)
    assert {check.outcome for check in verify(model, out)} == {"ok"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 123.0}))
    with pytest.raises(UserError, match="settings have changed[\\s\\S]*config.json"):
        convert_folder(job(model, out, text=False), resume=True)
    wrong = [check for check in verify(model, out) if check.outcome == "wrong"]
    assert [check.name for check in wrong] == ["source as it was converted"] and "config.json" in wrong[0].found


def test_the_command_line(tmp_path):
    from small_runs import byte_tokenizer, openling_command

    source = teacher(tmp_path / "source", LING)
    byte_tokenizer(source, vocabulary=50)
    text = tmp_path / "text.txt"
    text.write_text("ABCABCABDCBACB." * 60)
    flags = ["--layout.group_size", 2, "--text", text, "--text.sequence_length", 16, "--text.calibration_tokens", 128]
    done = openling_command("convert", source, tmp_path / "out", "--link", *flags)
    assert done.code == 0, done.err
    (tmp_path / "a [").mkdir()  # which is no markup
    done = openling_command("convert", source, tmp_path / "a [" / "out", "--weights-only", *flags[:2])
    assert done.code == 0 and f"{source} '{tmp_path}/a [/out'" in done.err, done.err
    ignored = ("--dtype", "float32", "--seed=1", "--linear_warmup.train.lr=9", "--gates.stop", "false", "--stages", "mla")
    ignored += ("--text.evaluation_tokens", "512")
    refused = openling_command("convert", source, tmp_path / "x", *flags, *ignored)
    unread = "--dtype, --linear_warmup.train.lr, --gates.stop, --stages, --text.evaluation_tokens"
    assert refused.code == 2 and f"value:    {unread}\n" in refused.err
    checked = openling_command("verify", source, tmp_path / "out")
    assert checked.code == 0 and checked.out.count("ok") == 6, checked.out
    ignored = ("--dry-run", "--link", "--resume", "--seed=1")
    for to in ("dcp", "hf"):
        refused = openling_command("convert", tmp_path / "out", tmp_path / "dcp", f"--to={to}", *ignored)
        assert refused.code == 2 and "--dry-run, --link, --resume, --seed" in refused.err
    assert not (tmp_path / "dcp").exists()
    assert openling_command("convert", tmp_path / "out", tmp_path / "dcp", "--to", "dcp").code == 0
    assert openling_command("convert", tmp_path / "dcp", tmp_path / "back", "--to", "hf").code == 0
    assert openling_command("verify", source, tmp_path / "back").code == 0
    refused = openling_command("convert", source, tmp_path / "x", "--to", "dpc")
    assert refused.code == 2 and "nearest:  dcp" in refused.err
