"""Files that appear under their name whole or not at all, however the writer ends. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor to write and read a file that appears under its name only when the block ends without an error.

    The error of a full disk names the file.
    """
    draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield handle
        os.fsync(handle)
        draft.rename(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE and error.filename is None:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    finally:
        os.close(handle)


def write_all(out: int, view: memoryview) -> None:
    """All bytes at the descriptor's place."""
    while len(view):
        view = view[os.write(out, view[: 1 << 30]) :]


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; several processes may write the same."""
    with new_file(path) as handle:
        write_all(handle, memoryview(json.dumps(value, indent=1).encode()))
