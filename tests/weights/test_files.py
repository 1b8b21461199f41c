"""Bytes that go from file to file: all of them, hashed as they arrived, with and without the kernel's help."""

import errno
import hashlib
import os

import pytest

from openling.errors import UserError
from openling.weights import files


@pytest.fixture(params=["by the kernel", "by hand"])
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1000)
    if request.param == "by hand":

        def refuse(*args, **kwargs):
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 2000, 12_345])
def test_a_range_is_appended_and_hashed(tmp_path, count):
    content, digest = os.urandom(20_000), hashlib.sha256(b"before")
    (tmp_path / "source").write_bytes(content)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "out").open("w+b", buffering=0) as out:
        out.write(b"before")
        files.copy_range(source.fileno(), out.fileno(), 77, count, digest, tmp_path / "source")
    wanted = b"before" + content[77 : 77 + count]
    assert (tmp_path / "out").read_bytes() == wanted
    assert digest.digest() == hashlib.sha256(wanted).digest()


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_ends_too_soon_is_named(tmp_path):
    (tmp_path / "source").write_bytes(os.urandom(2500))
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "out").open("w+b") as out,
        pytest.raises(UserError, match=r"shorter[\s\S]*source"),
    ):
        files.copy_range(source.fileno(), out.fileno(), 0, 3000, hashlib.sha256(), tmp_path / "source")


@pytest.mark.usefixtures("small_pieces")
def test_what_cannot_be_hashed_is_no_copy(tmp_path, monkeypatch):
    """A failure in the hashing thread reaches the caller, whichever piece it was."""
    (tmp_path / "source").write_bytes(os.urandom(5000))
    read, reads = os.preadv, []

    def fail(*args):
        reads.append(args)
        if len(reads) == 3:
            raise OSError(errno.EIO, "the disk cannot be read")
        return read(*args)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="cannot be read"):
        files.copy_file(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
