"""How large an engine is and what it may do; checked when it is built. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from openling.errors import UserError


@dataclass(frozen=True)
class EngineConfig:
    """Limits and switches of an `Engine`.

    max_running: sequences computed at once. step_tokens: tokens per step, which long prompts are cut to (None: 8192 on a GPU,
    2048 on a CPU). max_waiting and max_waiting_tokens: beyond them new requests are refused (`QueueFull`). max_model_len: prompt
    and reply together; None is what the model was trained for. pages (of 64 tokens) and slots (Lightning states, cached ones
    too) are what memory_bytes pays for, unless given. prefix_cache: requests start behind what others have computed. drafts:
    tokens the MTP layer proposes per step, where that pays or with draft_always. eager: no CUDA graphs. deterministic: a reply
    does not depend on the requests around it, to the bit. poison: memory that was never written is NaN (for tests).
    """

    max_running: int = 64
    step_tokens: int | None = None
    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 22
    max_model_len: int | None = None
    memory_bytes: int | None = None
    pages: int | None = None
    slots: int | None = None
    prefix_cache: bool = True
    drafts: int = 0
    draft_always: bool = False
    eager: bool = False
    deterministic: bool = False
    poison: bool = False
    weight_version: str = "0"

    def __post_init__(self) -> None:
        positive = ("max_running", "max_waiting", "max_waiting_tokens")
        optional = ("step_tokens", "max_model_len", "memory_bytes", "pages", "slots")
        for name in (*positive, *(n for n in optional if getattr(self, n) is not None)):
            if getattr(self, name) < 1:
                raise UserError("this engine setting has no meaning", where=name, value=getattr(self, name), expected="1 or more")
        if self.deterministic and self.drafts:
            # Whether a step verifies drafts depends on all its requests, and verifying rounds otherwise than decoding.
            raise UserError(
                "a deterministic engine cannot draft", where="drafts", value=self.drafts, expected="0, or deterministic off"
            )
        if not 0 <= self.drafts <= 3:
            # Kernels take a certain token and up to three drafts in one call.
            raise UserError("this many drafts cannot be verified at once", where="drafts", value=self.drafts, expected="0 to 3")


class QueueFull(Exception):
    """The waiting queue is at its bound. retry_after: seconds after which trying again makes sense."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
