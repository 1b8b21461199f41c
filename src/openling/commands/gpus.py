"""Flags that say which GPU a job is planned for: its rates and its memory. No torch here."""

from __future__ import annotations

import argparse

from openling.errors import UserError
from openling.plan.devices import GIB, Device, device

# flag: (field of Device, unit, what it is)
RATES = {
    "--peak-flops": ("peak", "TFLOPS", "printed BF16 peak, which MFU is a share of"),
    "--matmul-flops": ("matmul", "TFLOPS", "sustained rate of matrix products"),
    "--memory-bandwidth": ("bandwidth", "TB/S", "sustained rate of memory"),
    "--nvlink-bandwidth": ("nvlink", "GB/S", "one direction, inside a node"),
    "--network-bandwidth": ("network", "GB/S", "one direction per GPU, between nodes"),
    "--gpus-per-node": ("node", "N", "GPUs that NVLink joins"),
}
SCALES = {"TFLOPS": 1e12, "TB/S": 1e12, "GB/S": 1e9, "N": 1}


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Flags that replace the table's rates."""
    rates = parser.add_argument_group("rates of the GPU, instead of the table's")
    for flag, (_, unit, text) in RATES.items():
        rates.add_argument(flag, type=float, metavar=unit, help=text)


def planned_device(args: argparse.Namespace, name: str, flag: str) -> Device:
    """The GPU of that name with what flags replace. flag: the one that named it."""
    return device(name, flag).replace(**_rates(args))


def planned_reserve(args: argparse.Namespace) -> int | None:
    """Bytes of --reserve; None where it is not given."""
    if args.reserve is None:
        return None
    if not 0 <= args.reserve < float("inf"):
        raise UserError("this reserve is no size", where="--reserve", value=args.reserve, expected="a number of GiB, 0 or more")
    return int(args.reserve * GIB)


def _rates(args: argparse.Namespace) -> dict[str, float | int | None]:
    """The fields of `Device` that flags override."""
    found: dict[str, float | int | None] = {}
    for flag, (field, unit, _) in RATES.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and not 0 < value < float("inf"):
            raise UserError("a rate has to be positive", where=flag, value=value, expected=f"a number of {unit}")
        found[field] = None if value is None else value * SCALES[unit]
    found["node"] = None if found["node"] is None else int(found["node"])
    if args.gpu_memory is not None:
        if not 0 < args.gpu_memory < float("inf"):
            raise UserError("a memory has to be positive", where="--gpu-memory", value=args.gpu_memory, expected="a number of GB")
        found["memory"] = int(args.gpu_memory * 1e9)
    return found
