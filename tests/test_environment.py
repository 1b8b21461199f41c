"""What results say of the machine."""

import subprocess
import sys
from pathlib import Path

from openling.environment import peak_memory

ASKED = "from openling.environment import peak_memory; print(peak_memory())"
LARGE = f"""
import subprocess, sys
mine = bytearray(b"x") * (400 << 20)
subprocess.run([sys.executable, "-c", {ASKED!r}], check=True)
{ASKED}
"""


def test_peak_memory_is_the_program_s_own():
    """Not that of the large program which started it."""
    out = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True).stdout
    small, large = map(int, out.split())
    assert small < 200 << 20 and 400 << 20 < large < 600 << 20


def test_peak_memory_where_the_kernel_does_not_tell(monkeypatch):
    told = peak_memory()
    monkeypatch.setattr(Path, "read_text", lambda self: "Name:\tpython\n")
    assert told <= peak_memory() < 100 * told
