"""The processes that `torchrun` starts: how they find each other, where each runs, and how one's error ends all.

A rank that fails alone would leave the others waiting for it in a collective. So an error is noted in the store that the ranks
met in; each watches that note and ends when another has left it. Whoever notes first tells the user; of errors that all ranks
raise alike, that is the main rank. A rank that is killed notes nothing: `torchrun` ends the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from openling.errors import Failure, OpenlingError, UserError

NOTE = "openling/failed"
# How often the note is looked for; how long a rank may end by itself once it is there; by how much the main rank is preferred.
LOOK_SECONDS, GRACE_SECONDS, YIELD_SECONDS = 1.0, 10.0, 0.5
# What gloo and NCCL say where a peer is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store

    @property
    def main(self) -> bool:
        """Whether this rank speaks."""
        return self.rank == 0


def started_by_torchrun() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device) -> World:
    """Meet the other processes. device: cpu, or cuda, of which each rank of a machine takes its own."""
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        if here > torch.cuda.device_count():
            raise UserError(
                "there are more ranks than GPUs", where="--nproc-per-node", value=here,
                expected=f"at most {torch.cuda.device_count()}, or --device cpu",
            )  # fmt: skip
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # CPU tensors travel too: counts and signals, for which no GPU is to be waited.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("openling/groups", store), rank=rank, world_size=size)
    return World(rank, size, device, store)


@contextmanager
def ending_together(world: World) -> Iterator[None]:
    """An error in here is told once and ends every process; without one, all leave together."""
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(world.store, done), name="other ranks", daemon=True)
    watch.start()
    try:
        yield
        dist.all_reduce(torch.zeros(1))
        done.set()
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for the others of a rank that died: say why first
        time.sleep(0 if world.main else YIELD_SECONDS)
        code = error.exit_code if isinstance(error, OpenlingError) else 1
        if _noted_first(world.store, code):
            _tell(error, world)
        os._exit(code)  # groups that lost a rank may hang while they are taken down
    dist.destroy_process_group()


def _tell(error: BaseException, world: World) -> None:
    if isinstance(error, OpenlingError):
        print(f"openling: {error}" if world.main else f"openling, rank {world.rank}: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        print("openling: interrupted", file=sys.stderr, flush=True)
    elif isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
        gone = Failure(
            "another rank has died or cannot be reached", where=f"rank {world.rank}, which waited for it",
            expected="all ranks until the end; torchrun's report tells whose exit code came first, -9 being killed",
            next="the same command, with --resume where it has that, goes on from the newest checkpoint",
        )  # fmt: skip
        print(f"openling: {gone}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()


def _noted_first(store: dist.Store, code: int) -> bool:
    try:
        return store.add(NOTE, 1000 + code) == 1000 + code
    except RuntimeError:  # the store ended with the process that kept it, which has told why
        return False


def _watch(store: dist.Store, done: threading.Event) -> None:
    while not done.wait(LOOK_SECONDS):
        try:
            failed = store.check([NOTE])
        except RuntimeError:
            failed = True
        if failed and not done.wait(GRACE_SECONDS):
            os._exit(1)  # the main thread waits in a collective that nobody else enters
