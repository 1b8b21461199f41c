"""`openling demo` on a tiny teacher and a tiny shipped delta: all is shown, a kill loses nothing, a bad delta spoils nothing."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path

import pytest
from small_runs import Migrated, Place, Result, hashes, openling_command, refused

from openling.commands import demo
from openling.config.migrate import MigrateConfig, Recall, Text, Warmup, preset
from openling.config.train import TrainConfig
from openling.migrate import shipped
from openling.weights.delta import read_delta

PACKAGE, TOTAL_BYTES, FILE_BYTES = shipped.PLACE, 50_000_000, 25_000_000


def short(place: Place) -> MigrateConfig:
    train = TrainConfig(tokens=256, sequence_length=32, batch_size=4, warmup_steps=1, lr=1e-3, ce=0.0, kl=1.0)
    text = Text(
        calibration=(str(place.calibration),),
        evaluation=(f"prose={place.evaluation}",),
        sequence_length=64,
        calibration_tokens=512,
        evaluation_tokens=256,
    )
    warmup, recall = Warmup(train=train), Recall(lengths=(128,), samples=1)
    return preset("best", text=text, linear_warmup=warmup, mla_warmup=warmup, recall=recall, gates=demo.settings().gates)


@pytest.fixture(scope="module")
def package(migrated: Migrated, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for deltas with one in it, that of a whole migration."""
    folder = tmp_path_factory.mktemp("package")
    result = openling_command("delta", "make", place.teacher, migrated.out, folder / shipped.NAME)
    assert result.code == 0, result.err
    return folder


@pytest.fixture(autouse=True)
def small(place: Place, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short(place)
    monkeypatch.setattr(shipped, "PLACE", package)
    monkeypatch.setattr(demo, "settings", lambda: config)
    monkeypatch.setattr(demo, "CONTEXTS", (16, 64))


@pytest.fixture
def out(place: Place, tmp_path: Path) -> Path:
    """A demo's folder that has the teacher already."""
    shutil.copytree(place.teacher, tmp_path / "demo" / demo.TEACHER)
    return tmp_path / "demo"


@pytest.fixture(scope="module")
def finished(place: Place, package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a whole demo, and what it said."""
    folder, config = tmp_path_factory.mktemp("whole") / "demo", short(place)
    shutil.copytree(place.teacher, folder / demo.TEACHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "PLACE", package)
        patch.setattr(demo, "settings", lambda: config)
        patch.setattr(demo, "CONTEXTS", (16, 64))
        return folder, openling_command("demo", "--out", folder, "--device", "cpu")


@pytest.fixture
def unshipped(finished: tuple[Path, Result], tmp_path: Path) -> Path:
    """A demo that was killed before it came to the shipped delta."""
    out = tmp_path / "demo"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / demo.SHIPPED)
    path = out / f"{demo.HYBRID}.run" / "report.json"
    report = json.loads(path.read_text())
    del report["shipped"]
    path.write_text(json.dumps(report))
    return out


def report_of(out: Path, name: str = demo.HYBRID) -> dict:
    return json.loads((out / f"{name}.run" / "report.json").read_text())


def spoilt(package: Path, folder: Path) -> Path:
    """A copy of the delta that may be damaged."""
    shutil.copytree(package, folder)
    return folder / shipped.NAME


# ---------------------------------------------------------------------------------------------------------------------
# What it shows
# ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_hybrid_stands_beside_the_run(
    finished: tuple[Path, Result], package: Path, place: Place, tmp_path: Path
) -> None:
    out, result = finished
    assert result.code == 0, result.err
    again = openling_command("delta", "apply", place.teacher, package / shipped.NAME, tmp_path / "again")
    assert again.code == 0
    assert hashes(out / demo.SHIPPED) == hashes(tmp_path / "again")
    found, teacher = report_of(out)["shipped"], report_of(out)["stages"][0]
    assert found["tokens"] == 1024
    assert found["stage"]["domains"]["prose"]["teacher_loss"] == pytest.approx(teacher["domains"]["prose"]["loss"], abs=1e-9)
    assert [row["prompt"] for row in found["stage"]["samples"]] == [row["prompt"] for row in teacher["samples"]]
    loss = found["stage"]["domains"]["prose"]["loss"]
    page = unescape((out / f"{demo.HYBRID}.run" / "report.html").read_text())
    assert f"has {loss:.3f} on prose" in page
    for said in (result.out, page):
        assert "1.02K tokens on " in said
        assert f"{loss:.3f}" in said
        assert found["stage"]["samples"][0]["completion"].split("\n")[0].strip() in said
    for line in (f"  openling generate {out / demo.SHIPPED} 'Once upon a time'", f"  openling serve {out / demo.SHIPPED}"):
        assert line in result.out.splitlines()[-2:]


def test_only_the_shipped_hybrid(out: Path, finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = openling_command("demo", "--out", out, "--shipped", "--device", "cpu")
    assert result.code == 0, result.err
    assert not (out / demo.HYBRID).exists()
    assert hashes(out / demo.SHIPPED) == hashes(finished[0] / demo.SHIPPED)
    alone, beside = (report_of(folder, name)["shipped"] for folder, name in ((out, demo.SHIPPED), (finished[0], demo.HYBRID)))
    assert alone["stage"]["domains"] == beside["stage"]["domains"]
    page = (out / f"{demo.SHIPPED}.run" / "report.html").read_text()
    assert "The 4 softmax-attention layers of the teacher became 3 Lightning and 1 MLA layers" in page
    assert "this run" not in result.out
    monkeypatch.setattr(shipped, "measured", None)  # once is enough
    assert openling_command("demo", "--out", out, "--shipped", "--device", "cpu").code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Trouble
# ---------------------------------------------------------------------------------------------------------------------


def test_interrupted_anywhere_it_goes_on(out: Path, finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the last part stops one attempt; what was done before is never done again."""
    from openling.migrate import pipeline

    done: list[str] = []

    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def counted(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (done.append(name), real(*args, **kwargs))[1])

    for name in ("apply_delta", "measured"):
        counted(shipped, name)
    counted(pipeline, "to_lightning")
    again: tuple[str, ...] = ()
    for step in ("decoding", "applied", "measurer", "measured", "card"):
        with monkeypatch.context() as patch:
            patch.setattr(shipped, step, stopped)
            assert openling_command("demo", "--out", out, *again, "--device", "cpu").code == 130, step
        again = ("--resume",)
    result = openling_command("demo", "--out", out, "--resume", "--device", "cpu")
    assert result.code == 0, result.err
    assert done == ["to_lightning", "apply_delta", "measured"]
    assert report_of(out)["shipped"]["stage"]["domains"] == report_of(finished[0])["shipped"]["stage"]["domains"]
    # A finished demo is only shown again, and not begun anew.
    assert openling_command("demo", "--out", out, "--resume", "--device", "cpu").code == 0
    assert done == ["to_lightning", "apply_delta", "measured"]
    refused(openling_command("demo", "--out", out), "there is a demo in this folder already", "--resume")
    refused(openling_command("demo", "--out", out.with_name("none"), "--resume"), "nothing to resume")


def test_without_a_shipped_delta_the_rest_is_shown(unshipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "PLACE", tmp_path / "none")
    result = openling_command("demo", "--out", unshipped, "--resume", "--device", "cpu")
    assert result.code == 0, result.err
    assert "Only the short run is shown: no hybrid ships with this installation" in result.out
    assert "Where it leads" not in (unshipped / f"{demo.HYBRID}.run" / "report.html").read_text()
    refused(openling_command("demo", "--out", unshipped, "--shipped"), "no hybrid ships", str(tmp_path / "none"))


@pytest.mark.parametrize("trouble", ["damaged", "truncated", "missing part", "no record", "another teacher"])
def test_a_bad_delta_is_named_and_the_rest_is_shown(
    trouble: str, unshipped: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = spoilt(package, tmp_path / "package")
    monkeypatch.setattr(shipped, "PLACE", tmp_path / "package")
    part, record = delta / "delta-00001.safetensors", delta / "delta.json"
    data, told = part.read_bytes(), part.name
    if trouble == "damaged":
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif trouble == "truncated":
        part.write_bytes(data[:-1])
    elif trouble == "missing part":
        part.unlink()
    elif trouble == "no record":
        record.unlink()
        told = record.name
    else:
        contents = json.loads(record.read_text())
        contents["teacher"]["sha256"] = "0" * 64
        record.write_text(json.dumps(contents))
        told = demo.TEACHER
    result = openling_command("demo", "--out", unshipped, "--resume", "--device", "cpu")
    refused(result, told)
    assert "Report:" in result.out
    assert "MLA warm-up" in result.out
    assert not (unshipped / demo.SHIPPED).exists()
    # Mended, the demo goes on.
    monkeypatch.setattr(shipped, "PLACE", package)
    assert openling_command("demo", "--out", unshipped, "--resume", "--device", "cpu").code == 0


def test_a_hybrid_that_was_changed_since_is_refused(finished: tuple[Path, Result], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(finished[0], out)
    (out / demo.SHIPPED / "config.json").write_text("{}")
    refused(openling_command("demo", "--out", out, "--resume", "--device", "cpu"), "config.json", f"remove {out / demo.SHIPPED}")


# ---------------------------------------------------------------------------------------------------------------------
# What really ships
# ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_delta_is_small_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "PLACE", PACKAGE)
    folder = shipped.find_delta()
    if folder is None:
        pytest.skip("no hybrid ships yet")
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) <= FILE_BYTES
    assert sum(sizes) <= TOTAL_BYTES
    about = read_delta(folder).about
    assert about["trained tokens"] > 0
    assert about["hardware"]
    assert about["recipe"]
    assert all(text["licence"] for text in about["texts"])
    losses = list(about["losses"].values())
    assert losses[-1].keys() == losses[0].keys() != set()
    card = (folder / "README.md").read_text()
    for field in ("license: apache-2.0", "| tokens |", "| data |", "| made with |", "| hardware |", "| loss on "):
        assert field in card, field
