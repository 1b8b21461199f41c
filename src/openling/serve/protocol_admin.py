"""What trainers and operators send. Names in brackets are SGLang's, which RL tools know; they mean the same here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from openling.serve.protocol import Body, LogitBias, Stop


class GenerateParams(Body):
    """How to sample; `SamplingParams` of serve/types.py in JSON."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, validation_alias=AliasChoices("seed", "sampling_seed"))
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_new_tokens"))
    min_tokens: int | None = Field(None, ge=0, validation_alias=AliasChoices("min_tokens", "min_new_tokens"))
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None


class GenerateRequest(Body):
    """The body of /generate: token ids in. `rid` names the call for /abort.

    stream: events, each with the reply so far, or with `incremental` only what is new in it.
    """

    prompt_token_ids: list[int] = Field(min_length=1, validation_alias=AliasChoices("prompt_token_ids", "input_ids"))
    sampling_params: GenerateParams = Field(default_factory=GenerateParams)
    return_logprob: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, validation_alias=AliasChoices("top_logprobs", "top_logprobs_num"))
    prompt_logprobs: bool | None = None
    routed_experts: bool | None = Field(None, validation_alias=AliasChoices("routed_experts", "return_routed_experts"))
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    rid: str | None = Field(None, min_length=1, max_length=128)
    stream: bool | None = None
    incremental: bool | None = None

    @model_validator(mode="after")
    def _incremental_needs_a_stream(self) -> Self:
        if self.incremental and not self.stream:
            raise ValueError("incremental goes with stream: true")
        return self


class PauseRequest(BaseModel):
    """keep: replies stay where they are and go on after /resume; abort: they end with what they have."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["keep", "abort", "retract", "in_place"] = "keep"


class AbortRequest(Body):
    """Which call to end: the id of its reply, its X-Request-Id or its rid; or all."""

    request_id: str | None = Field(None, max_length=128, validation_alias=AliasChoices("request_id", "rid"))
    abort_all: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.request_id) == bool(self.abort_all):
            raise ValueError("give request_id, or abort_all: true")
        return self


# It stands in replies, logs and labels of metrics.
Version = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class UpdateRequest(BaseModel):
    """New weights from a checkpoint folder of the same model. hashes: SHA-256 per weight, checked before anything changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, max_length=4096, validation_alias=AliasChoices("path", "model_path"))
    version: Version = Field(validation_alias=AliasChoices("version", "weight_version"))
    hashes: dict[str, str] | None = None


class BeginRequest(Body):
    """Start of an update whose weights are sent in pieces."""

    version: Version


class CommitRequest(Body):
    """End of such an update. hashes: SHA-256 of every weight that was sent."""

    hashes: dict[str, str] = Field(min_length=1)


class Empty(BaseModel):
    """Nothing is asked; what clients of other servers send along is ignored."""

    model_config = ConfigDict(extra="ignore")
