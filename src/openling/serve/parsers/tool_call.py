"""One tool call on its way from text to deltas."""

from __future__ import annotations

import re

from openling.serve.parsers.machine import Delta, Found

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BAD = " bad"  # no name of a function
_NAME = re.compile(r"[\w.:/-]{1,256}")


def is_name(text: str) -> bool:
    """Whether a function can be called this."""
    return _NAME.fullmatch(text) is not None


class ToolCall:
    """What is known of a call. Arguments that come before the name wait for it."""

    def __init__(self, found: Found, number: int, id: str) -> None:
        self.begun = False
        self.has_arguments = False
        self._found, self._number, self._id = found, number, id
        self._waiting = ""

    def begin(self, name: str) -> None:
        """Announce the call, once; nothing for what is no name."""
        if self.begun or not is_name(name):
            return
        self.begun = True
        self._found.add(Delta(call=self._number, id=self._id, name=name, arguments=self._waiting))

    def arguments(self, text: str) -> None:
        """More of the arguments."""
        if self.begun and text:
            self._found.add(Delta(call=self._number, arguments=text))
        elif text:
            self._waiting += text
