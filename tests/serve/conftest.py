"""One browser for all tests of a process; it starts when the first one asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium import webdriver


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    from browser import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
