"""One server for all tests of a process; it starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from server_process import Served


@pytest.fixture(scope="session")
def nano_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`openling serve` on the nano model, with an API key."""
    from server_process import API_KEY, served_nano

    with served_nano(tmp_path_factory.mktemp("served") / "nano", key=API_KEY) as server:
        yield server
