"""What a run changes of its models and its process while it trains, and puts back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from openling.config.train import TrainConfig
from openling.model.ling import Ling

# A signal that comes again within this time is one that a launcher handed on.
ONE_SIGNAL_SECONDS = 0.5


def own_memory(teacher: Ling | None, chosen: dict[str, nn.Parameter]) -> None:
    """Parameters that a derived model shares with its teacher get memory of their own: what is followed must not learn along."""
    theirs = set() if teacher is None else {p.data_ptr() for p in teacher.parameters() if not isinstance(p, DTensor)}
    for p in chosen.values():
        if not isinstance(p, DTensor) and p.data_ptr() in theirs:
            p.data = p.data.clone()


@contextmanager
def in_training(model: Ling) -> Iterator[None]:
    """Expert layers count their tokens in training mode only; nothing else differs in it."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def only_gradients_of(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Iterator[None]:
    """Freeze all other parameters, so that backward ends below the lowest chosen one; undone afterwards."""
    before = {p: p.requires_grad for p in model.parameters()}
    wanted = set(chosen.values())
    try:
        for p in before:
            p.requires_grad_(p in wanted)
        yield
    finally:
        for p, needed in before.items():
            p.requires_grad_(needed)
            p.grad = None


@contextmanager
def cast_once(models: list[Ling], trained: set[nn.Parameter], config: TrainConfig) -> Iterator[None]:
    """On a CPU, hold frozen matrices in BF16, as autocast would otherwise cast them again in every step; undone afterwards.

    A head that is also the embedding stays: embeddings are read in FP32. So does what FSDP holds: it casts by itself.
    """
    read = {m.weight for model in models for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {m.weight for model in models for m in model.modules() if isinstance(m, nn.Linear)}
    here = {p for p in matrices - read - trained if p.device.type == "cpu" and not isinstance(p, DTensor)}
    wide = {p: p.data for p in here if config.precision == "bf16"}
    try:
        for p, data in wide.items():
            p.data = data.to(torch.bfloat16)
        yield
    finally:
        for p, data in wide.items():
            p.data = data


@contextmanager
def caught_signals() -> Iterator[Callable[[], int | None]]:
    """Note SIGINT and SIGTERM instead of dying in mid-step; a second one does what it did before.

    Launchers hand on what a terminal or a scheduler sends to all processes already: what follows at once is the same signal.
    """
    caught: list[int] = []
    noted = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if not caught:
            caught.append(number)
            noted = time.monotonic()
        elif time.monotonic() - noted > ONE_SIGNAL_SECONDS:
            restore()
            signal.raise_signal(number)

    try:
        for number in before:
            signal.signal(number, note)
        yield lambda: caught[0] if caught else None
    finally:
        restore()
