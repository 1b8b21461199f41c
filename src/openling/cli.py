"""The verbs. Nothing heavy is imported until one runs; errors become one message and an exit code.

Exit codes: 0 done, 2 a mistake in what was asked, 1 a failure, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from openling import __version__
from openling.errors import OpenlingError, UserError, nearest

# verb: (module with add_arguments(parser) and run(args), what it does)
VERBS = {
    "demo": ("openling.commands.demo", "convert SmolLM2-135M on this machine and report what happened"),
    "plan": ("openling.commands.plan", "what a migration yields and costs; a training job on many GPUs; a size for a budget"),
    "migrate": ("openling.commands.migrate", "turn a GQA checkpoint into a Lightning + MLA hybrid"),
    "convert": ("openling.commands.convert", "the same conversions from disk to disk, at any size; checkpoint formats"),
    "verify": ("openling.commands.verify", "re-check a finished conversion against its source"),
    "delta": ("openling.commands.delta", "a hybrid as what it adds to its teacher, and back"),
    "generate": ("openling.commands.complete", "one completion from any checkpoint folder"),
    "chat": ("openling.commands.chat", "talk to any checkpoint folder"),
    "serve": ("openling.commands.serve", "an OpenAI-compatible server with a chat page"),
    "train": ("openling.commands.train", "pre-training, continued training and mid-training: the stages of a recipe"),
    "merge": ("openling.commands.merge", "the weighted mean of checkpoints, instead of a decay of the learning rate"),
    "data": ("openling.commands.data", "build, inspect and verify tokenised corpora; sample text from a model"),
    "bench": ("openling.commands.bench", "measure the kernels, or a server under load"),
}

# A disk that is full or may not be written is the user's to mend, and so is a path that cannot be.
USER_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG}
USER_ERRNOS |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}


# GNU OpenMP's threads turn round while they wait for one another, by default for milliseconds: beside one other busy process nano
# trained 300 tokens/s on two cores. With this many turns it is 2,200, and on idle ones no slower (docs/lab.md).
SPINS = "10000"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    try:
        with _interrupts():
            return _run(words)
    except OpenlingError as error:
        print(f"openling: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("openling: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        where = f"\n  where:    {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where += "\n  next:     free some space, then the same command again, with --resume where it has that"
        print(f"openling: {error.strerror}{where}", file=sys.stderr)
        return 2


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt: extension modules that it meets while they are imported make other errors of it."""
    noted = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (ImportError, RuntimeError, SystemError) as error:
        if noted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(words: list[str]) -> int:
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UserError(
            "unknown command", value=verb, expected=", ".join(VERBS), nearest=nearest(verb, VERBS), next="openling --help"
        )
    typed = shlex.join(["openling", *words])
    parser = argparse.ArgumentParser(prog="openling", description="GQA checkpoints become Ling-2.6 style hybrids.")
    parser.add_argument("--version", action="version", version=f"openling {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    run: Callable[[argparse.Namespace], int] | None = None
    for name, (module, summary) in VERBS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == verb:
            loaded = import_module(module)
            loaded.add_arguments(command)
            run = loaded.run
            chosen = command
    flags = [flag for action in chosen._actions for flag in action.option_strings] if run else []
    overrides: list[str] = []
    if run and chosen.get_default("takes_overrides"):
        words, overrides = _split(words, flags)
    args, rest = parser.parse_known_args(words)
    assert run is not None  # argparse has exited if there was no verb
    args.overrides, args.flags, args.command = overrides, flags, typed
    if rest:
        close = nearest(rest[0], flags) if rest[0].startswith("-") else None
        raise UserError("unknown argument", value=rest[0], nearest=close, next=f"openling {verb} --help")
    return run(args)


def _split(words: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """What argparse knows, and the settings `--a.b value` or `--a.b=value`, which may stand anywhere."""
    known: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, _ = word.partition("=")
        if not flag.startswith("--") or flag == "--" or flag in flags:
            known.append(word)
            continue
        settings.append(word)
        if not equals and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return known, settings


if __name__ == "__main__":
    sys.exit(main())
