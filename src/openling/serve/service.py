"""What the routes share: the engine, the text side of the model, admission, metrics, and the calls that are under way."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from openling.config.serve import ServeConfig
from openling.serve.admission import Admission
from openling.serve.auth import Caller
from openling.serve.checks import check_counts, too_long
from openling.serve.merged import Replies
from openling.serve.metrics import Metrics
from openling.serve.problems import ApiError, bad, from_validation, unavailable
from openling.serve.sse import dumps
from openling.serve.types import EngineStats, Output, Request, SamplingParams

if TYPE_CHECKING:
    from openling.serve.admin_routes import Upload
    from openling.serve.async_engine import AsyncEngine
    from openling.serve.text import ModelText

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")


@dataclass
class Service:
    """One served model. Used from the event loop's thread only, but for `engine`'s own thread and the text workers."""

    engine: AsyncEngine
    text: ModelText
    config: ServeConfig
    model_id: str
    max_model_len: int
    weight_version: str = ""
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    # Every id that a client may know a call by -> the calls of that id.
    active: dict[str, list[Call]] = field(default_factory=dict)
    upload: Upload | None = None
    reading: bool = False  # whether /update_weights holds a second copy of the weights

    def __post_init__(self) -> None:
        self.admission = Admission(self.config.limits)
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="openling-text")

    async def in_worker(self, work: Callable[[], T]) -> T:
        """Text work (templates, tokenizing, grammars) off the event loop, with the time limit `timeouts.render`."""
        try:
            async with asyncio.timeout(self.config.timeouts.render):
                return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        except TimeoutError:
            raise bad("this request takes too long to prepare", None, "preparation_timeout") from None

    async def read(self, http: HttpRequest, model: type[Model]) -> Model:
        """The checked body of a request; raises ApiError 400. An empty body counts as an empty object."""
        body = await http.body()
        try:
            data = from_json(body, allow_inf_nan=False) if body else {}
        except ValueError as error:
            raise bad(f"the body is not valid JSON: {error}", None, "invalid_json") from None
        if not isinstance(data, dict):
            raise bad("the body must be a JSON object", None, "invalid_json")
        check_counts(data, self.config.limits, self.max_model_len)
        try:
            return model.model_validate(data)
        except ValidationError as error:
            raise from_validation(error, set(model.model_fields)) from None

    def check_model(self, asked: str | None) -> None:
        """Raise ApiError 404 if a client asks for another model than the one served."""
        if asked is not None and asked not in (self.model_id, "default"):
            message = f"the model '{asked[:100]}' is not served here; this is '{self.model_id}'"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def stats(self) -> EngineStats:
        """A snapshot of the engine; raises ApiError 503 if it has stopped."""
        if not self.engine.healthy:
            raise unavailable("the engine has stopped")
        stats: EngineStats = await self.engine.call(lambda engine: engine.stats())
        self.weight_version = stats.weight_version
        return stats

    def check_size(self, characters: int, param: str) -> None:
        """Refuse so much text, which cannot fit the context, before any of it is tokenized."""
        if characters > self.max_model_len * self.text.longest_token:
            raise too_long(self.max_model_len, param)

    def close(self) -> None:
        """Let the workers go."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.text.close()


class Call:
    """One API call: its replies in the engine, its room in the admission, its entry among the active calls."""

    def __init__(self, service: Service, http: HttpRequest, prefix: str, *, name: str | None = None) -> None:
        self.service = service
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.request_id: str = http.state.request_id
        self.caller: Caller = http.state.caller
        self.created = int(time.time())
        self.replies: Replies | None = None
        self._names = {self.id, self.request_id, name or self.id}
        self._stack = ExitStack()

    async def start(self, prompts: Sequence[tuple[Sequence[int], SamplingParams]], cache_salt: str | None = None) -> None:
        """Admit and submit one reply per (prompt, parameters). Raises ApiError 429, 503."""
        service = self.service
        if not service.engine.healthy:
            raise unavailable("the engine has stopped")
        namespace = f"{self.caller.namespace}/{cache_salt or ''}"
        requests = [Request(f"{self.id}:{i}", tuple(ids), params, namespace=namespace) for i, (ids, params) in enumerate(prompts)]
        tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._stack.enter_context(service.admission.admit(self.caller.namespace, len(requests), tokens))
        for name in self._names:
            service.active.setdefault(name, []).append(self)
            self._stack.callback(self._forget, name)
        self.replies = Replies(service.engine, requests, seconds=service.config.timeouts.reply, timings=service.metrics)
        try:
            await self.replies.start()
        except BaseException:
            await self.aclose()
            raise

    def _forget(self, name: str) -> None:
        left = [call for call in self.service.active.pop(name, ()) if call is not self]
        if left:
            self.service.active[name] = left

    def abort(self) -> None:
        """End every reply with what it has."""
        if self.replies is not None:
            self.replies.abort()

    def note(self, output: Output) -> None:
        """Remember which weights made the newest tokens."""
        if output.weight_version:
            self.service.weight_version = output.weight_version

    async def aclose(self) -> None:
        """Free everything: what runs is aborted."""
        try:
            if self.replies is not None:
                await self.replies.aclose()
        finally:
            self._stack.close()


class Usage:
    """Tokens of one call, over all its replies."""

    def __init__(self, replies_per_prompt: int) -> None:
        self._per_prompt = replies_per_prompt
        self._latest: dict[int, Output] = {}

    def note(self, index: int, output: Output) -> None:
        """Count one output of reply `index`."""
        self._latest[index] = output

    def body(self) -> dict[str, Any]:
        """OpenAI's usage object; a prompt counts once however many replies it has."""
        prompts = {index // self._per_prompt: output for index, output in self._latest.items()}
        prompt = sum(output.prompt_tokens for output in prompts.values())
        completion = sum(output.completion_tokens for output in self._latest.values())
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage["prompt_tokens_details"] = {"cached_tokens": sum(output.cached_tokens for output in prompts.values())}
        drafted = sum(output.drafted_tokens for output in self._latest.values())
        accepted = sum(output.accepted_tokens for output in self._latest.values())
        if drafted:
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            }
        return usage


def json_response(value: Any, status: int = 200) -> Response:
    """A JSON answer; log-probabilities in `value` must be finite already."""
    return Response(dumps(value), status, media_type="application/json")
