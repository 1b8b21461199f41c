"""The `openai` and `anthropic` packages against a live server with a random nano model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import openai
import pytest
import torch
from server_process import API_KEY, Served

import openling

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def client(nano_server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nano_server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def loaded(nano_server: Served) -> openling.weights.folder.Loaded:
    return openling.load(nano_server.model)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano"
    assert client.models.retrieve("nano").id == "nano"
    assert model.model_extra["max_model_len"] == 32768


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="nano", messages=ASK, max_completion_tokens=8, temperature=0)
    again = client.chat.completions.create(model="nano", messages=ASK, max_tokens=8, temperature=0)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == again.choices[0].message.content
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens <= 8
    assert reply.system_fingerprint


def test_a_stream_is_the_reply_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "nano", "messages": ASK, "max_tokens": 24, "seed": 7, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] == whole.choices[0].finish_reason


def test_several_replies(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="nano", messages=ASK, n=3, max_tokens=12, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1
    same = client.chat.completions.create(model="nano", messages=ASK, n=3, max_tokens=12, seed=1)
    assert [c.message.content for c in same.choices] == [c.message.content for c in reply.choices]


def test_logprobs_are_the_models(client: openai.OpenAI, loaded: openling.weights.folder.Loaded) -> None:
    reply = client.chat.completions.create(
        model="nano",
        messages=ASK,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        temperature=0.7,
        seed=2,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    entries = reply.choices[0].logprobs.content
    text = loaded.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    ids = loaded.tokenizer(text).input_ids
    tokens = reply.choices[0].model_extra["token_ids"]
    assert len(entries) == len(tokens) == 6
    with torch.no_grad():
        expected = loaded.model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1].log_softmax(-1)
    for token, row, entry in zip(tokens, expected, entries, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called_as_its_schema_says(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": "nano", "messages": ASK, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 400, "seed": 3}
    asked["parallel_tool_calls"] = False  # noise would call for ever
    if stream:
        with client.chat.completions.stream(**asked) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"city", "days"}
    assert arguments["days"] in (1, 2, 3)
    assert len(arguments["city"]) <= 8
    after = [*ASK, choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(model="nano", messages=after, tools=[WEATHER], max_tokens=4).choices


def test_json_schema(client: openai.OpenAI) -> None:
    colours = {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3}
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "colours": colours},
        "required": ["name", "colours"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(model="nano", messages=ASK, response_format=wanted, max_tokens=300, seed=5)
    found = json.loads(reply.choices[0].message.content)
    assert found.keys() == {"name", "colours"}
    assert set(found["colours"]) <= {"red", "blue"}


def test_completions(client: openai.OpenAI, loaded: openling.weights.folder.Loaded) -> None:
    text = "The sky is"
    ids = loaded.tokenizer(text).input_ids
    by_text = client.completions.create(model="nano", prompt=text, max_tokens=4, temperature=0)
    by_ids = client.completions.create(model="nano", prompt=[ids, ids[:4]], max_tokens=4, temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert len(by_ids.choices) == 2
    echoed = client.completions.create(model="nano", prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=1)
    found = echoed.choices[0].logprobs.token_logprobs
    with torch.no_grad():
        expected = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert found[0] is None
    assert found[1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-4)
    assert echoed.choices[0].text.startswith(text)


def test_errors_are_the_clients_own(client: openai.OpenAI, nano_server: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{nano_server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="nano", messages=ASK, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="32768"):
        client.chat.completions.create(model="nano", messages=ASK, max_tokens=40000)


@pytest.fixture(scope="module")
def claude(nano_server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=nano_server.url, api_key=API_KEY, max_retries=0, timeout=60) as found:
        yield found


def test_messages(claude: anthropic.Anthropic) -> None:
    asked = {"model": "nano", "system": "Be brief.", "messages": ASK[1:], "max_tokens": 12}
    asked["extra_body"] = {"temperature": 0}
    reply = claude.messages.create(**asked)
    assert (reply.role, reply.type) == ("assistant", "message")
    assert reply.stop_reason in ("end_turn", "max_tokens")
    assert reply.usage.output_tokens <= 12
    with claude.messages.stream(**asked) as events:
        streamed = events.get_final_message()
    assert [block.text for block in streamed.content] == [block.text for block in reply.content]
    assert streamed.usage.output_tokens == reply.usage.output_tokens


def test_models_in_anthropics_words(claude: anthropic.Anthropic) -> None:
    page = claude.models.list()
    (model,) = page.data
    assert (model.id, model.type, model.display_name) == ("nano", "model", "nano")
    assert model.created_at.tzinfo is not None
    assert (page.has_more, page.first_id, page.last_id) == (False, "nano", "nano")


def test_messages_as_a_schema_says(claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"days": {"enum": [1, 2, 3]}}, "required": ["days"], "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    reply = claude.messages.create(model="nano", messages=ASK[1:], max_tokens=400, output_config=config)
    assert reply.stop_reason == "end_turn"
    assert json.loads(reply.content[0].text)["days"] in (1, 2, 3)


def test_messages_with_a_tool(claude: anthropic.Anthropic) -> None:
    function = WEATHER["function"]
    tool = {"name": "weather", "description": function["description"], "input_schema": function["parameters"]}
    asked = {"model": "nano", "messages": ASK[1:], "max_tokens": 400, "tools": [tool], "tool_choice": {"type": "any"}}
    asked["tool_choice"]["disable_parallel_tool_use"] = True
    reply = claude.messages.create(**asked)
    assert reply.stop_reason == "tool_use"
    (use,) = [block for block in reply.content if block.type == "tool_use"]
    assert use.name == "weather"
    assert use.input["days"] in (1, 2, 3)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
    turn = {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in reply.content]}
    assert claude.messages.create(model="nano", messages=[*ASK[1:], turn, result], max_tokens=4, tools=[tool]).content is not None
