"""One tiny teacher and one whole migration of it, shared by the tests."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from small_runs import (
    Migrated,
    Place,
    hashes,
    make_llama,
    weights_only,
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    # Real sentences with enough letters to learn from; what they say does not matter here.
    (folder / "cal.txt").write_text(" ".join((contextlib.__doc__ or "", str(shutil.__doc__), str(json.__doc__))) * 2)
    (folder / "eval.txt").write_text((subprocess.__doc__ or "")[:2000])
    return Place(make_llama(folder / "teacher"), folder / "cal.txt", folder / "eval.txt")


@pytest.fixture
def quick() -> Iterator[None]:
    with weights_only():
        yield


@pytest.fixture(scope="session")
def migrated(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Migrated:
    out = tmp_path_factory.mktemp("whole") / "hybrid"
    before = hashes(place.teacher)
    return Migrated(out, out.with_name("hybrid.run"), place.migrate(out), before)
