"""`openling serve` as users start it: a process of its own on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from openling.bench.nano import write_nano

ADMIN_KEY = "admin-key-of-the-tests"
API_KEY = "key-of-the-tests"


@dataclass
class Served:
    """A running server. `url` ends without a slash; `start_seconds`: processor time until it answered."""

    url: str
    model: Path
    process: subprocess.Popen[str]
    log: list[str]
    start_seconds: float

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def served(model: Path, *flags: str, key: str | None = None) -> Iterator[Served]:
    """Serve a folder; with `key`, only for those who have it."""
    env = os.environ | {"OPENLING_ADMIN_KEY": ADMIN_KEY, "OMP_NUM_THREADS": "1"} | ({"OPENLING_API_KEY": key} if key else {})
    command = [sys.executable, "-m", "openling.cli", "serve", str(model), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    log: list[str] = []
    address: list[str] = []
    found = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if not address and (match := re.search(r"http://[\d.]+:\d+", line)):
                address.append(match[0])
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert found.wait(60) and address, "".join(log)
        _wait_until_ready(address[0], process)
        used = psutil.Process(process.pid).cpu_times()
        yield Served(address[0], model, process, log, used.user + used.system)
    finally:
        process.kill()
        process.wait()
        reader.join()


def _wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    """/health needs no key."""
    for _ in range(600):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server does not answer")


@contextmanager
def served_nano(folder: Path, *flags: str, key: str | None = None) -> Iterator[Served]:
    """The nano model, written to a new folder and served."""
    with served(write_nano(folder), *flags, key=key) as server:
        yield server
