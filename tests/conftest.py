"""Tiny models gain nothing from threads and lose much when test processes share the cores.

Without a GPU the Triton kernels are tested in Triton's interpreter, which must be chosen before they are first imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from selenium import webdriver

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One for all tests of a process; it starts when the first of them asks for it."""
    from browser import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
