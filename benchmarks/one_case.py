"""Runs cases of `openling bench kernels` a few times without timing them, for a profiler to look at.

    ncu --clock-control none --section SpeedOfLight --section WarpStateStats -k regex:decode --launch-skip 2 --launch-count 1 \
        python benchmarks/one_case.py cases_mla "MLA decode" "B32 S32768 H64 T1"
    python benchmarks/one_case.py cases_moe "MoE d_gate_up" --watch

`--watch` calls for two seconds instead and prints what nvidia-smi says meanwhile: clock of the multiprocessors, power, reasons
for a lower clock. A kernel that runs at 1.4 GHz because of the power limit cannot reach rates quoted for 1.98.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from importlib import import_module

import torch

FIELDS = "clocks.sm,power.draw,clocks_event_reasons.sw_power_cap,clocks_event_reasons.hw_slowdown"


def main() -> None:
    """The first case of the module whose op is the given one and whose shape begins as given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="cases_lightning, cases_mla, cases_moe, ...")
    parser.add_argument("op")
    parser.add_argument("shape", nargs="?", default="")
    parser.add_argument("--watch", action="store_true")
    args = parser.parse_args()
    cases = import_module(f"openling.bench.{args.module}").cases(False)
    case = next(case for case in cases if case.op == args.op and case.shape.startswith(args.shape))
    for _ in range(3):
        case.ours()
    torch.cuda.synchronize()
    if args.watch:
        print(f"{case.op}, {case.shape}: {_watched(case.ours)}")


def _watched(call: object) -> str:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seen: list[str] = []
    calls, began = 0, time.monotonic()
    start.record()
    while time.monotonic() - began < 2:
        for _ in range(20):
            call()  # type: ignore[operator]
        calls += 20
        if len(seen) < 3 and time.monotonic() - began > 0.5:
            query = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader", "--id=0"]
            seen.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
        torch.cuda.current_stream().synchronize()
    end.record()
    end.synchronize()
    return f"{1000 * start.elapsed_time(end) / calls:.0f} us a call; {' | '.join(seen)}"


if __name__ == "__main__":
    main()
