"""A recipe's run killed at random many times, and gone on with: the long form of two tests, whose scenarios these are.

    python benchmarks/kills.py [KILLS]

On one rank, and on two that gloo joins, of which one dies and the other goes on alone for up to 0.3 s. Where the losses of every
step and the last weights of both stages are, to the bit, those of a run that was never killed, each kill was survived. Writes
benchmarks/results/training/kills.json; a kill that was not survived ends it with what the test says, and nothing is written.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openling.environment import write_results

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "training" / "kills.json"
SCENARIOS = {
    "one rank": "tests/train/test_stages.py::test_a_run_killed_at_random_ends_with_the_same_weights",
    "two ranks": "tests/train/test_torchrun.py::test_ranks_killed_at_random_end_with_the_same_weights",
}
# The acceptance of training asks for this many on one rank.
GOAL = 20


def survived(where: str, test: str, kills: int) -> dict[str, Any]:
    """Run a scenario; its row."""
    begun = time.monotonic()
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", test]
    subprocess.run(words, cwd=ROOT, env=os.environ | {"OPENLING_KILLS": str(kills)}, check=True)
    return {
        "name": f"kills at random that a run of two stages survived, {where}", "value": kills, "unit": "kills",
        "goal": GOAL, "met": kills >= GOAL, "seconds": round(time.monotonic() - begun), "test": test,
    }  # fmt: skip


def main() -> None:
    """Both scenarios."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else GOAL
    rows = [survived(where, test, kills) for where, test in SCENARIOS.items()]
    write_results(RESULTS, shlex.join(["python", *sys.argv]), rows)


if __name__ == "__main__":
    main()
