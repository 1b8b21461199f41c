"""Built corpora as the text of a migration."""

from pathlib import Path

import numpy as np
import pytest
from small_runs import Place, openling_command, refused

import openling
from openling.data import dataset
from openling.data.dataset import Dataset, scattered_tokens
from openling.errors import UserError
from openling.weights.folder import load_tokenizer


def corpus(place: Place, folder: Path, **texts: str) -> Path:
    sources = []
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        sources.append(f"{name}={folder / name}.txt")
    built = openling_command("data", "build", *sources, folder / "corpus", "--tokenizer", place.teacher, "--licence", "MIT")
    assert built.code == 0, built.err
    return folder / "corpus"


def test_every_token_once_in_blocks_of_all_sources(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SCATTERED_BLOCK", 16)
    folder = corpus(place, tmp_path, a="a b c d e " * 40, z="v w x y z " * 40)
    tokenizer = load_tokenizer(place.teacher, openling.load(place.teacher).config)
    streams = [Dataset(folder).stream(name) for name in ("a", "z")]
    everything = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    found = scattered_tokens([folder], tokenizer, vocab_size=260, max_tokens=None)
    assert found.dtype == np.int32
    assert np.array_equal(np.sort(found), np.sort(everything))
    assert not np.array_equal(found, everything)
    fewer = scattered_tokens([folder], tokenizer, vocab_size=260, max_tokens=100)
    assert np.array_equal(fewer, found[:100])
    # Half of the first blocks come from either source: of 6 with a fair coin 0 or 6 would be 1 in 32, and the order is fixed.
    first = set(tokenizer.decode(fewer).replace(" ", ""))
    assert first & set("abcde")
    assert first & set("vwxyz")
    with pytest.raises(UserError, match="tokens that the model has not"):
        scattered_tokens([folder], tokenizer, vocab_size=200, max_tokens=None)


def test_a_migration_reads_a_built_corpus(place: Place, tmp_path: Path, quick: None) -> None:
    folder = corpus(place, tmp_path, text=place.calibration.read_text())
    result = place.migrate(tmp_path / "out", "--stage", "lightning", **{"text.calibration": f'["{folder}"]'})
    assert result.code == 0, result.err
    assert '"licence": "MIT"' in (tmp_path / "out.run" / "report.json").read_text()
    mixed = place.migrate(tmp_path / "mixed", **{"text.calibration": f'["{folder}", "{place.calibration}"]'})
    refused(mixed, "cannot be mixed", "cal.txt")
