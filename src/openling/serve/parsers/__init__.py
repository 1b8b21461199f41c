"""From the text of a reply to thinking, content and tool calls: `choose` by the template, a `ReplyParser` per reply."""

from openling.serve.parsers.choose import REASONING_PARSERS, TOOL_PARSERS, ReplyFormat, choose
from openling.serve.parsers.machine import Delta
from openling.serve.parsers.reply import Parsed, ParsedCall, ReplyParser

__all__ = ["REASONING_PARSERS", "TOOL_PARSERS", "Delta", "Parsed", "ParsedCall", "ReplyFormat", "ReplyParser", "choose"]
