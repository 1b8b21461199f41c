"""Safetensors to DCP and back: the same bits, one tensor in memory, and folders that torch itself wrote or reads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import GOLDEN, HYBRID, tiny

import openling
from openling.errors import UserError
from openling.weights import dcp as ours
from openling.weights.dcp import from_dcp, to_dcp
from openling.weights.export import save
from openling.weights.io import CheckpointReader, FolderWriter


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def test_there_and_back_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "BATCH_BYTES", 5000)
    source = save(tiny(HYBRID), tmp_path / "hf", dtype=torch.bfloat16, shard_bytes=30_000)
    to_dcp(source, tmp_path / "dcp")
    from_dcp(tmp_path / "dcp", tmp_path / "back", shard_bytes=30_000)
    same(tensors(source), tensors(tmp_path / "back"))
    ids = torch.arange(12)[None]
    assert torch.equal(openling.load(source).model(ids), openling.load(tmp_path / "back").model(ids))
    assert not list(tmp_path.glob(".*"))


def test_odd_dtypes_nan_payloads_and_scalars(tmp_path: Path) -> None:
    odd = {
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16),
        "nan": torch.tensor([0x7FC1, 0xFFFF, 0x8000], dtype=torch.int32).to(torch.int16).view(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "integers": torch.arange(5),
    }
    with FolderWriter(tmp_path / "hf") as writer:
        for name, tensor in odd.items():
            writer.add(name, tensor)
    from_dcp(to_dcp(tmp_path / "hf", tmp_path / "dcp"), tmp_path / "back")
    found = tensors(tmp_path / "back")
    for name, tensor in odd.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_torch_reads_ours_and_we_read_torchs(tmp_path: Path) -> None:
    source = GOLDEN / "ling-2.0-tiny"
    expected = tensors(source)
    to_dcp(source, tmp_path / "dcp")
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    same(found, expected)
    dcp.save(expected | {"step": 3}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    from_dcp(tmp_path / "theirs", tmp_path / "back")
    same(tensors(tmp_path / "back"), expected)


def test_tensors_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written so far grows between two reads: none is kept until the end."""
    source, written = GOLDEN / "ling-2.0-tiny", []
    original = CheckpointReader.read

    def read(self: CheckpointReader, name: str) -> torch.Tensor:
        written.append(sum(p.stat().st_size for p in tmp_path.rglob("*.distcp")))
        return original(self, name)

    monkeypatch.setattr(CheckpointReader, "read", read)
    to_dcp(source, tmp_path / "dcp")
    assert len({*written}) > 3


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no DCP folder"):
        from_dcp(GOLDEN / "ling-2.0-tiny", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        to_dcp(GOLDEN / "ling-2.0-tiny", tmp_path / "there")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def cut(count: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:count])


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("__0_0.distcp", cut(5000), "truncated[\\s\\S]*__0_0.distcp[\\s\\S]*5000 bytes"),
        ("__0_0.distcp", Path.unlink, "missing[\\s\\S]*__0_0.distcp"),
        ("__0_0.distcp", lambda path: path.write_bytes(bytes(path.stat().st_size)), "damaged"),
        (".metadata", cut(100), "damaged[\\s\\S]*metadata"),
        (".metadata", cut(0), "damaged[\\s\\S]*metadata"),
        (".metadata", lambda path: path.write_bytes(b"garbage\n"), "damaged[\\s\\S]*metadata"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, name: str, damage: Callable[[Path], object], said: str) -> None:
    to_dcp(GOLDEN / "ling-2.0-tiny", tmp_path / "dcp")
    damage(tmp_path / "dcp" / name)
    with pytest.raises(UserError, match=said):
        from_dcp(tmp_path / "dcp", tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["dcp"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full from the start, or later, in the middle of a tensor or of a small file."""
    source, disk = GOLDEN / "ling-2.0-tiny", tmp_path / "disk"
    needed = CheckpointReader(source).total_bytes
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={needed + (1 << 20)}", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        original = CheckpointReader.read

        for left in (0, 8 << 10, needed // 2, needed + (8 << 10)):

            def filling(self: CheckpointReader, name: str, left: int = left) -> torch.Tensor:
                if not (disk / "ballast").exists():
                    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))
                return original(self, name)

            monkeypatch.setattr(CheckpointReader, "read", filling)
            with pytest.raises(UserError, match="no space left while writing; nothing was kept"):
                to_dcp(source, disk / "out")
            assert [p.name for p in disk.iterdir()] == ["ballast"]
            (disk / "ballast").unlink()
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - needed // 2))
        with pytest.raises(UserError, match="not enough space on the disk"):
            to_dcp(source, disk / "out")
        assert [p.name for p in disk.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", disk], check=True)
