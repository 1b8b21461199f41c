"""Tiny models gain nothing from threads and lose much when test processes share the cores.

Without a GPU the Triton kernels are tested in Triton's interpreter, which must be chosen before they are first imported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from selenium import webdriver

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores interrupts
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files whose tests share something slow to make, by what that is; and those of several processes, which wait for each other and
# take four times as long where two such tests run at once. (xdist's own groups do nothing: xdist 3.8 writes them into a field
# that pytest 9.2 does not read.)
SHARED = {
    "tests/migrate/test_smollm2.py": "SmolLM2",
    "tests/migrate/test_delta.py": "whole migration",
    "tests/migrate/test_demo.py": "whole migration",
    "tests/migrate/test_gates.py": "taught teachers",
    "tests/migrate/test_pipeline.py": "whole migration",
    "tests/migrate/test_refusals.py": "whole migration",
    "tests/migrate/test_stream_trouble.py": "whole stream",
    "tests/ops/test_context_parallel.py": "worlds",
    "tests/parallel/test_parallel_worlds.py": "worlds",
    "tests/parallel/test_pipelines.py": "worlds",
    "tests/report/test_report_in_browser.py": "browser and server",
    "tests/serve/test_against_transformers.py": "replies of transformers",
    "tests/serve/test_browser.py": "browser and server",
    "tests/serve/test_clients.py": "browser and server",
    "tests/serve/test_markdown.py": "browser and server",
    "tests/train/test_loop_on_meshes.py": "worlds",
    "tests/train/test_torchrun.py": "worlds",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share something run in one process, and first; all others wherever there is time."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return SHARED.get(nodeid.split("::")[0], nodeid)

    return Together(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One for all tests of a process; it starts when the first of them asks for it."""
    from browser import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
