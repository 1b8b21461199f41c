"""Routes without a reply from the model: models, health, metrics, tokens and texts, the page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import openling
from openling.serve.chat import render
from openling.serve.problems import ApiError, bad, unavailable
from openling.serve.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest
from openling.serve.service import Service, json_response


def _model_card(service: Service) -> dict[str, Any]:
    """What OpenAI's clients read, then what Anthropic's read, then ours."""
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "openling",
        "type": "model",
        "display_name": service.model_id,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "max_model_len": service.max_model_len,
        "weight_version": service.weight_version,
    }


async def models(service: Service, http: HttpRequest) -> Response:
    """GET /v1/models: the one model, its context and the version of its weights."""
    page = {"has_more": False, "first_id": service.model_id, "last_id": service.model_id}
    return json_response({"object": "list", "data": [_model_card(service)]} | page)


async def model(service: Service, http: HttpRequest) -> Response:
    """GET /v1/models/{id}."""
    service.check_model(http.path_params["model"])
    return json_response(_model_card(service))


async def health(service: Service, http: HttpRequest) -> Response:
    """GET /health: 200 while the engine can serve. Needs no key."""
    if not service.engine.healthy:
        raise unavailable("the engine has stopped")
    return json_response({"status": "ok"})


async def ready(service: Service, http: HttpRequest) -> Response:
    """GET /ready: 200 while new requests would be computed; 503 while draining or paused."""
    if service.draining or not service.engine.healthy:
        raise unavailable("the server is draining" if service.draining else "the engine has stopped")
    if service.engine.paused:
        raise unavailable("the engine is paused; requests would wait until /resume")
    return json_response({"status": "ready", "model": service.model_id})


async def version(service: Service, http: HttpRequest) -> Response:
    """GET /version."""
    return json_response({"version": openling.__version__, "weight_version": service.weight_version})


async def metrics(service: Service, http: HttpRequest) -> Response:
    """GET /metrics in Prometheus' format; an engine that has stopped leaves its last counts."""
    if service.engine.healthy:
        service.metrics.engine = await service.stats()
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(service: Service, http: HttpRequest) -> Response:
    """POST /tokenize: token ids of a text, or of messages as the chat template renders them."""
    body = await service.read(http, TokenizeRequest)
    service.check_model(body.model)
    if body.prompt is not None:
        prompt, special = body.prompt, body.add_special_tokens is not False
        service.check_size(len(prompt), "prompt")
        ids = await service.in_worker(lambda: service.text.encode(prompt, special=special))
    else:
        chat = ChatRequest(messages=body.messages, tools=body.tools, chat_template_kwargs=body.chat_template_kwargs)
        ids = (await render(service, chat)).ids
    reply: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len}
    if body.return_token_strs:
        reply["token_strs"] = [service.text.name(id, before) for id, before in zip(ids, [None, *ids], strict=False)]
    return json_response(reply)


async def detokenize(service: Service, http: HttpRequest) -> Response:
    """POST /detokenize: the text of token ids, special tokens written out."""
    body = await service.read(http, DetokenizeRequest)
    service.check_model(body.model)
    if len(body.tokens) > service.max_model_len:
        raise bad(f"{len(body.tokens)} tokens; at most {service.max_model_len}", "tokens", "context_length_exceeded")
    wrong = next((id for id in body.tokens if id >= service.text.vocab_size), None)
    if wrong is not None:
        raise bad(f"token id {wrong} is not in the vocabulary", "tokens")
    text = await service.in_worker(lambda: service.text.full(body.tokens))
    return json_response({"prompt": text})


async def tokenizer_info(service: Service, http: HttpRequest) -> Response:
    """GET /tokenizer_info: what evaluation harnesses need to work without a copy of the tokenizer."""
    tokenizer = service.text.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    info: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
    info |= {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names}
    info |= {"chat_template": tokenizer.chat_template, "vocab_size": service.text.vocab_size}
    info["tokenizer_class"] = type(tokenizer).__name__
    info["model_max_length"] = service.max_model_len
    return json_response(info)


async def not_found(service: Service, http: HttpRequest) -> Response:
    """Every other path."""
    raise ApiError(404, "there is no such route; GET /openapi.json lists them", code="not_found")
