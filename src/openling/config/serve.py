"""What the server allows: addresses, bounds and deadlines; no torch here."""

from __future__ import annotations

from pydantic import Field

from openling.config.section import Section


class LimitsConfig(Section):
    """Bounds that are checked before work is done. What is beyond them is answered 400, 413 or 429."""

    body_bytes: int = Field(32 << 20, gt=0, description="a request's body")
    weight_bytes: int = Field(1 << 30, gt=0, description="a body of /update_weights/stream")
    header_bytes: int = Field(64 << 10, ge=1024, description="a request's line and headers")
    connections: int = Field(4096, gt=0, description="open connections; further ones are closed")
    messages: int = Field(4096, gt=0, description="messages of a conversation")
    parts: int = Field(65_536, gt=0, description="content parts and tool calls of a conversation")
    tools: int = Field(256, ge=0, description="tools of a request")
    n: int = Field(16, gt=0, le=128, description="replies per prompt")
    prompts: int = Field(256, gt=0, description="prompts of one /v1/completions request")
    choices: int = Field(256, gt=0, description="prompts times n")
    total_tokens: int = Field(4 << 20, gt=0, description="choices times max_tokens")
    stop: int = Field(4, ge=0, description="stop strings")
    stop_characters: int = Field(256, gt=0, description="characters of a stop string")
    logprobs: int = Field(20, ge=0, description="alternatives reported per token")
    logit_bias: int = Field(1024, ge=0, description="entries of logit_bias")
    schema_bytes: int = Field(64 << 10, gt=0, description="a JSON schema or a grammar")
    schema_depth: int = Field(32, gt=0, description="levels of a JSON schema")
    regex_characters: int = Field(2048, gt=0, description="a regular expression, also inside a schema")
    replies: int = Field(2048, gt=0, description="replies under way or waiting, all clients together")
    prompt_tokens: int = Field(8 << 20, gt=0, description="prompt tokens of the replies under way or waiting")
    replies_per_key: int = Field(1024, gt=0, description="replies under way or waiting for one API key")
    prompt_tokens_per_key: int = Field(4 << 20, gt=0, description="their prompt tokens")


class TimeoutsConfig(Section):
    """Seconds after which the server stops waiting."""

    headers: float = Field(10, gt=0, description="from the connection's first byte to the last header")
    body: float = Field(30, gt=0, description="for the whole body")
    idle: float = Field(5, gt=0, description="between two requests on one connection")
    write: float = Field(30, gt=0, description="for a client to take one event")
    reply: float = Field(600, gt=0, description="for a whole reply; beyond it 408")
    render: float = Field(10, gt=0, description="for the chat template and the tokenizer")
    drain: float = Field(30, ge=0, description="for replies under way after SIGTERM")
    comment: float = Field(15, gt=0, description="of silence on a stream before a comment keeps it open")


class ServeConfig(Section):
    """The server's settings. Keys are never settings: they come from the environment or a file."""

    model_id: str | None = Field(None, description="name that clients ask for; null: the folder's")
    tool_parser: str = Field("auto", description="how the model writes tool calls; auto: as its chat template shows")
    reasoning_parser: str = Field("auto", description="whether it thinks in <think>; auto: as its chat template shows")
    limits: LimitsConfig = LimitsConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
