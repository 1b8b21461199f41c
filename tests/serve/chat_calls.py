"""What tests of chat ask, in both dialects, and how they ask it."""

from scripted_engine import ScriptedEngine, says

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("first", "second")]
A_TOOLS = [
    {"name": "first", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"name": "second", "input_schema": {}},
]
CALLS = """So:
<tool_call>
{"name": "first", "arguments": {"x": 1}}
</tool_call>
<tool_call>
{"name": "second", "arguments": {}}
</tool_call>"""


def say(server, *pieces):
    server.service.engine = ScriptedEngine(says(*pieces))


def ask(server, path=CHAT, status=200, **body):
    answer = server.client.post(path, {"messages": HI} | body)
    assert answer.status == status, answer.body
    return answer.json


def stream(server, path=CHAT, **body):
    answer = server.client.post(path, {"messages": HI, "stream": True} | body)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return answer.events
