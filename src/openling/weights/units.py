"""The journal of a job that several processes, on several machines with a shared folder, may do together and resume.

The job is a set of units with fixed names. `claims/UNIT` is locked (flock) by whoever works on a unit: the lock ends with the
process, however that ends. `done/UNIT.json` appears whole when the unit is done and says what came of it, hashes included.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openling.errors import UserError
from openling.weights.whole import write_json


def read_record(path: Path, run: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """What a file of a run's own says; a UserError where it is broken, or lacks one of these fields."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise broken(path, run, str(error)) from error
    if not isinstance(value, dict):
        raise broken(path, run, f"a {type(value).__name__}, no object")
    if wrong := [name for name, kind in fields.items() if not isinstance(value.get(name), kind)]:
        raise broken(path, run, f"no usable {', '.join(wrong)}")
    return value


def broken(path: Path, run: Path, why: str) -> UserError:
    """The error of a record that is not as it was written."""
    return UserError("a record of this run is broken", where=path, value=why, next=f"remove {run}, start again")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, once whoever holds it lets go of it or ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Units:
    """Claims and results below a run folder, which must exist. The shared file system must know locks (flock)."""

    def __init__(self, run: Path) -> None:
        self.claims, self.done = run / "claims", run / "done"
        for folder in (self.claims, self.done):
            folder.mkdir(exist_ok=True)

    def result(self, unit: str) -> dict[str, Any] | None:
        """What came of a unit, or None while it is not done."""
        path = self.done / f"{unit}.json"
        try:
            return read_record(path, self.done.parent, {})
        except FileNotFoundError:
            return None

    @contextmanager
    def claim(self, unit: str) -> Iterator[bool]:
        """Hold a unit; False where it is done or somebody else holds it."""
        handle = os.open(self.claims / unit, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield self.result(unit) is None
        finally:
            os.close(handle)

    def record(self, unit: str, result: dict[str, Any]) -> None:
        """A unit is done."""
        write_json(self.done / f"{unit}.json", result)

    def forget(self, unit: str) -> None:
        """A unit is to be done again."""
        (self.done / f"{unit}.json").unlink(missing_ok=True)
