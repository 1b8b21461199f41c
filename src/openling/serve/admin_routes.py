"""Routes for trainers and operators, behind the admin key: exact tokens, pauses, weights, memory.

Every change happens in the engine's thread between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from openling.errors import UserError
from openling.serve import control
from openling.serve.engine import Engine
from openling.serve.merged import as_api_error
from openling.serve.problems import ApiError, bad
from openling.serve.protocol_admin import AbortRequest, BeginRequest, CommitRequest, Empty, PauseRequest, UpdateRequest
from openling.serve.service import Service, json_response
from openling.weights.folder import load


@dataclass
class Upload:
    """Weights that arrived in pieces and are not yet in use."""

    version: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


async def pause(service: Service, http: HttpRequest) -> Response:
    """POST /pause: no step is computed until /resume."""
    body = await service.read(http, PauseRequest)
    await service.engine.call(lambda engine: engine.pause("keep"))
    if body.mode == "abort":
        _abort_all(service)
    return await _state(service)


async def resume(service: Service, http: HttpRequest) -> Response:
    """POST /resume: go on after /pause."""
    await service.read(http, Empty)
    await _in_engine(service, lambda engine: engine.resume())
    return await _state(service)


async def abort(service: Service, http: HttpRequest) -> Response:
    """POST /abort: end one call, or all; what they have so far is their reply."""
    body = await service.read(http, AbortRequest)
    if body.abort_all:
        return json_response({"aborted": _abort_all(service)})
    calls = service.active.get(body.request_id or "", [])
    for call in list(calls):
        call.abort()
    return json_response({"aborted": len(calls)})


def _abort_all(service: Service) -> int:
    calls = {id(call): call for named in service.active.values() for call in named}
    for call in calls.values():
        call.abort()
    return len(calls)


async def update_weights(service: Service, http: HttpRequest) -> Response:
    """POST /update_weights: all weights from a checkpoint folder on the server's disk."""
    body = await service.read(http, UpdateRequest)
    engine = service.engine.engine
    dtype = engine.model.lm_head.weight.dtype
    if service.reading:
        raise ApiError(409, "another update is reading its weights", code="update_under_way")
    service.reading = True
    try:
        loaded = await asyncio.to_thread(lambda: load(Path(body.path), dtype=dtype))
        return await _flip(service, body.version, list(control.weights(loaded.model).items()), body.hashes)
    except UserError as error:
        raise _told(error) from None
    except (OSError, ValueError) as error:  # a name that cannot be a path, or one that this server may not read
        raise bad(f"the folder cannot be read: {getattr(error, 'strerror', None) or error}", "path", "invalid_weights") from None
    finally:
        service.reading = False


async def begin_update(service: Service, http: HttpRequest) -> Response:
    """POST /update_weights/begin: what an earlier begin left is dropped."""
    body = await service.read(http, BeginRequest)
    service.upload = Upload(body.version)
    return json_response({"version": body.version})


async def stream_update(service: Service, http: HttpRequest) -> Response:
    """POST /update_weights/stream: some weights, as the bytes of a safetensors file (application/octet-stream)."""
    upload = _upload(service)
    raw = await http.body()
    try:
        tensors = await asyncio.to_thread(load_tensors, raw)
    except Exception as error:  # whatever the bytes are, they are not what this route takes
        raise bad(f"the body is not a safetensors file: {type(error).__name__}", None, "invalid_weights") from None
    shapes = {name: (weight.shape, weight.dtype) for name, weight in control.weights(service.engine.engine.model).items()}
    for name, tensor in tensors.items():
        if name not in shapes:
            raise bad(await asyncio.to_thread(_no_weight, name, shapes), "name", "invalid_weights")
        if (tensor.shape, tensor.dtype) != shapes[name]:
            shape, dtype = shapes[name]
            raise bad(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}", name, "invalid_weights")
    upload.tensors.update(tensors)
    return json_response({"version": upload.version, "received": sorted(upload.tensors)})


async def commit_update(service: Service, http: HttpRequest) -> Response:
    """POST /update_weights/commit: check the hashes of what arrived and use it, all or nothing."""
    body = await service.read(http, CommitRequest)
    upload = _upload(service)
    missing = sorted(set(body.hashes) - set(upload.tensors))
    if missing:
        raise bad(f"{len(missing)} weights have not arrived, e.g. '{missing[0][:200]}'", "hashes", "invalid_weights")
    answer = await _flip(service, upload.version, list(upload.tensors.items()), body.hashes)
    service.upload = None
    return answer


def _told(error: UserError) -> ApiError:
    """Every part of the error: which weight or file, what it is, what was expected."""
    return bad("; ".join(" ".join(line.split()) for line in str(error).splitlines()), None, "invalid_weights")


def _no_weight(name: str, known: Iterable[str]) -> str:
    """Off the event loop: comparing names takes long where there are many."""
    close = get_close_matches(name[:200], list(known), n=3)
    return f"the model has no weight '{name[:200]}'" + (f"; nearest are {', '.join(close)}" if close else "")


def _upload(service: Service) -> Upload:
    if service.upload is None:
        raise ApiError(409, "no update has begun; POST /update_weights/begin", code="no_update")
    return service.upload


async def _flip(service: Service, version: str, tensors: list[tuple[str, Tensor]], hashes: dict[str, str] | None) -> Response:
    try:
        await service.engine.call(lambda engine: engine.update_weights(version, tensors, hashes))
    except UserError as error:
        raise _told(error) from None
    service.weight_version = version
    return json_response({"success": True, "message": "", "weight_version": version, "weights": len(tensors)})


async def checksum(service: Service, http: HttpRequest) -> Response:
    """GET /weights/checksum: one SHA-256 over all names and weights."""
    value = await service.engine.call(lambda engine: engine.checksum())
    return json_response({"sha256": value, "weight_version": (await service.stats()).weight_version})


async def weight(service: Service, http: HttpRequest) -> Response:
    """GET /weights/{name}: one weight as a safetensors file."""
    name = http.path_params["name"]
    try:
        tensor = await service.engine.call(lambda engine: engine.get_weight(name))
    except UserError as error:
        close = error.parts["nearest"]
        hint = f"; did you mean '{close}'?" if close else ""
        raise ApiError(404, f"the model has no weight '{name[:200]}'{hint}", param="name", code="weight_not_found") from None
    raw = await asyncio.to_thread(save_tensors, {name: tensor.contiguous()})
    return Response(raw, media_type="application/octet-stream", headers={"X-SHA256": control.tensor_hash(tensor)})


async def flush_cache(service: Service, http: HttpRequest) -> Response:
    """POST /flush_cache: forget cached prefixes; running replies keep theirs."""
    await _in_engine(service, lambda engine: engine.flush_cache())
    return json_response({"success": True})


async def release_memory(service: Service, http: HttpRequest) -> Response:
    """POST /release_memory: weights to the host, caches dropped, the engine paused."""
    await service.read(http, Empty)
    await _in_engine(service, lambda engine: engine.release_memory())
    return await _state(service)


async def resume_memory(service: Service, http: HttpRequest) -> Response:
    """POST /resume_memory: take the memory back; the engine stays paused until /resume."""
    await service.read(http, Empty)
    await _in_engine(service, lambda engine: engine.restore_memory())
    return await _state(service)


async def _state(service: Service) -> Response:
    stats = await service.stats()
    return json_response(
        {"success": True, "paused": stats.paused, "running": stats.running, "weight_version": stats.weight_version}
    )


async def _in_engine(service: Service, work: Callable[[Engine], object]) -> None:
    try:
        await service.engine.call(work)
    except UserError as error:
        raise as_api_error(error) from None
