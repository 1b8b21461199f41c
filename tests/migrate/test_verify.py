"""What `openling verify` says of finished migrations; of streamed conversions: test_stream_trouble.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from small_runs import VOCABULARY, Migrated, Place, make_llama, openling_command, refused

from openling.migrate.verify import verify
from openling.weights.files import MANIFEST


def test_a_finished_folder_can_be_checked_again(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    outcomes = {check.name: check.outcome for check in verify(place.teacher, migrated.out)}
    assert outcomes.pop("Lightning heads are the source's") == "not run"  # they were trained since
    assert len(outcomes) > 4
    assert set(outcomes.values()) == {"ok"}
    shutil.copytree(migrated.out, tmp_path / "out")
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    wrong = [check for check in verify(place.teacher, tmp_path / "out") if check.outcome == "wrong"]
    assert wrong[0].name == "files as they were written"


def test_small_files_are_checked_too(migrated: Migrated, place: Place, tmp_path: Path) -> None:
    """All but the model card; of a manifest from before they were in it, what was not looked at is said."""
    out = shutil.copytree(migrated.out, tmp_path / "out")

    def files() -> tuple[str, str]:
        checks = {check.name: check for check in verify(place.teacher, out)}
        found = checks.pop("files as they were written")
        assert {check.outcome for check in checks.values()} == {"ok", "not run"}
        return found.outcome, found.found

    (out / "README.md").write_text("mine")
    assert files()[0] == "ok" and files()[1].endswith("all files but README.md")
    config = json.loads((out / "config.json").read_text())
    changed = json.dumps(config | {"rope_theta": 123.0, "rms_norm_eps": 0.5})
    others = {"config.json": changed, "tokenizer.json": "{}", "modeling_openling.py": "no code", "generation_config.json": "{}"}
    for name, text in others.items():
        before = (out / name).read_bytes()
        (out / name).write_text(text)
        assert files()[0] == "wrong" and files()[1].startswith(f"{name}: ")
        (out / name).write_bytes(before)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] = {name: about for name, about in manifest["files"].items() if name.endswith(".safetensors")}
    (out / MANIFEST).write_text(json.dumps(manifest))
    (out / "config.json").write_text(changed)
    assert files()[0] == "ok" and "has none of config.json" in files()[1]


def test_mixers_that_were_trained_as_they_are_do_not_count_as_untouched(place: Place, tmp_path: Path, quick: None) -> None:
    """A warm-up of a half-way model, and one of all mixers: the teacher's own ones, too, are no longer its."""
    flags = ("--linear_warmup.train.lr", "0.05", "--linear_warmup.trainable")
    assert place.migrate(tmp_path / "both", "--stages", "lightning,linear-warmup", *flags, "attention").code == 0
    assert place.migrate(tmp_path / "half", "--stage", "lightning").code == 0
    words = ("--stage", "linear-warmup", "--teacher", place.teacher, *flags, "best")
    assert place.migrate(tmp_path / "warm", *words, model=tmp_path / "half").code == 0
    for source, out, left_out in ((place.teacher, tmp_path / "both", 2), (tmp_path / "half", tmp_path / "warm", 15)):
        outcome, found = untouched(source, out)
        assert outcome == "ok" and f"; {left_out} left out, which were trained" in found
        manifest = json.loads((out / MANIFEST).read_text())
        trained = manifest.pop("trained")
        (out / MANIFEST).write_text(json.dumps(manifest))  # as older versions wrote it
        outcome, found = untouched(source, out)
        assert outcome == "not run" and ".attention." in found and MANIFEST in found
        (out / MANIFEST).write_text(json.dumps(manifest | {"trained": trained[:0]}))
        assert untouched(source, out)[0] == "wrong"


def untouched(source: Path, out: Path) -> tuple[str, str]:
    """What `verify` says of tensors that nothing has changed; nothing else may be wrong."""
    checks = {check.name: check for check in verify(source, out)}
    found = checks.pop("untouched tensors identical")
    assert {check.outcome for check in checks.values()} == {"ok", "not run"}
    return found.outcome, found.found


def test_another_model_is_told_from_the_source(migrated: Migrated, tmp_path: Path) -> None:
    """By one message, not by the first name or byte that differs."""
    for changes in ({"layers": 3}, {"layers": 5}, {"vocab_size": VOCABULARY + 40}):
        other = make_llama(tmp_path / str(changes), **changes)
        refused(openling_command("verify", other, migrated.out), "OUT was made of another model", str(other))


def test_a_folder_of_another_type_holds_the_rounded_values(place: Place, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "out"
    assert place.migrate(out, "--stage", "lightning", "--dtype", "float32").code == 0
    assert {check.outcome for check in verify(place.teacher, out)} <= {"ok", "not run"}
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] += 2**-20  # what BF16 does not show
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    wrong = {check.name: check.found for check in verify(place.teacher, out) if check.outcome == "wrong"}
    assert wrong["untouched tensors identical"] == "model.norm.weight: its values, as torch.float32, differ"
