"""The OpenAPI document, from the route table and the models that check the bodies: what it says is what is enforced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

import openling

if TYPE_CHECKING:
    from openling.serve.server import Endpoint

_ERRORS = {
    400: "the request is wrong",
    401: "no key, or an unknown one",
    403: "admin routes are off, or another Host",
    404: "no such route or model",
    405: "the route takes another method",
    408: "a deadline has passed",
    409: "not in this state",
    413: "the body is too large",
    415: "the body has another type",
    429: "too much is under way; Retry-After says when to come back",
    500: "the server's fault",
    503: "loading, draining or stopped; Retry-After says when to come back",
}
_NULLABLE = {"type": ["string", "null"]}
_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE, "code": _NULLABLE},
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "request_id": _NULLABLE,
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def document(table: Sequence[Endpoint]) -> dict[str, Any]:
    """The document as JSON."""
    bodies = sorted({entry.body for entry in table if entry.body is not None}, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for entry in table:
        paths.setdefault(entry.path.replace(":path}", "}"), {})[entry.method.lower()] = _operation(entry)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "openling",
            "version": openling.__version__,
            "description": "OpenAI-compatible serving; see docs/api.md.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS | definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(entry: Endpoint) -> dict[str, Any]:
    summary = (entry.handler.__doc__ or "").strip().splitlines()[0]
    found: dict[str, Any] = {"operationId": f"{entry.method.lower()} {entry.path}", "summary": summary, "tags": [entry.access]}
    found["responses"] = {"200": _success(entry)} | {str(status): _error(entry, text) for status, text in _ERRORS.items()}
    if entry.access != "open":
        found["security"] = [{"key": []}, {}]  # which of the two depends on how the server was started
    name = entry.path.partition("{")[2].partition(":")[0]
    if name:
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    if entry.binary:
        found["requestBody"] = {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}
    elif entry.body is not None:
        schema = {"$ref": f"#/components/schemas/{entry.body.__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found


def _success(entry: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {entry.answers: {}}
    if entry.answers == "application/json":
        content[entry.answers] = {"schema": {"type": ["object", "array"]}}
    if entry.streams:
        content["text/event-stream"] = {}  # a schema would be of the text to some readers and of each event to others
    return {"description": "done", "content": content}


def _error(entry: Endpoint, text: str) -> dict[str, Any]:
    shape = "AnthropicError" if entry.path.startswith("/v1/messages") else "Error"
    return {"description": text, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}}
