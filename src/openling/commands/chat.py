"""`openling chat`: a conversation in the terminal with any checkpoint folder that has a chat template."""

from __future__ import annotations

import argparse
from pathlib import Path

from openling.commands.complete import add_sampling, load_to_talk, render_chat, say

HELP = "Type a message and press Enter. /new begins again, /quit (or Ctrl-D) ends."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling chat`."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--system", help="a system message to begin with")
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves; exit code 0."""
    loaded = load_to_talk(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    render_chat(loaded, [*messages, {"role": "user", "content": "?"}])  # no template: say so before the first question
    print(HELP)
    while True:
        try:
            line = input("\n> ").strip().encode(errors="replace").decode()  # bytes that are not UTF-8 become question marks
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/quit":
            return 0
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = say(loaded, render_chat(loaded, messages), args)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                print()
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
