"""The one chat renderer: for supervised training, RL, serving and evaluation, by the checkpoint's own template.

Tokens are truth: a conversation that has ids is never encoded again. `ChatRenderer.extend` gives the ids that new messages add.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openling.data.messages import MARKS, checked_kwargs, normalise, text_of
from openling.data.template import IsolatedTemplate, LocalTemplate, Rendered, Template
from openling.errors import Failure, UserError

Messages = Sequence[Mapping[str, Any]]


_PROBE = "\u2042 end \u2042"  # stands where a message's text ends, to find the place in what a template makes of it


@dataclass(frozen=True)
class Example:
    """A conversation for training: ids, and which of them the assistant wrote, its end of turn included."""

    ids: list[int]
    assistant: list[bool]


class ChatRenderer:
    """Messages to text and ids. tokenizer: a fast `transformers` one; template: what renders, its checkpoint's by default.

    isolated: render in a process that can be stopped, which a server must; `close()` ends it.
    Raises UserError where the checkpoint has no template.
    """

    def __init__(self, tokenizer: Any, *, template: Template | None = None, isolated: bool = False) -> None:
        self.tokenizer = tokenizer
        if template is None:
            source = template_source(tokenizer)
            template = IsolatedTemplate(source) if isolated else LocalTemplate(source)
        self.template = template
        self._specials = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._developer = "developer" in template.source
        self._control = _control_tokens(tokenizer)

    def close(self) -> None:
        """End the process of an isolated template."""
        if isinstance(self.template, IsolatedTemplate):
            self.template.close()

    def render(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation, opened for the assistant's turn if `add_generation_prompt`.

        tools: function tools in OpenAI's form; kwargs: settings of the template that `messages.TEMPLATE_KWARGS` lists.
        """
        return self._rendered(messages, tools, kwargs, add_generation_prompt).text

    def render_open(self, messages: Messages, *, tools: Messages | None = None, kwargs: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation up to the end of the last message's own text, for the model to write on there.

        Raises UserError where the template does not show that text.
        """
        last = messages[-1]
        probed = {**last, "content": text_of(last.get("content"), f"messages[{len(messages) - 1}]") + _PROBE}
        text, found, _ = self._rendered([*messages[:-1], probed], tools, kwargs, False).text.rpartition(_PROBE)
        if not found:
            raise UserError("the chat template leaves the last message out, so that it cannot be continued")
        return text

    def encode(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of `render`."""
        return self._ids(self.render(messages, tools=tools, kwargs=kwargs, add_generation_prompt=add_generation_prompt))

    def extend(
        self,
        ids: Sequence[int],
        messages: Messages,
        new: Messages,
        *,
        tools: Messages | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids that `new` appends to `ids`, which hold `messages` as the model read and wrote them.

        What still closes the last turn comes first: all of it where the model was cut off, the rest where it ended its turn
        itself. Raises Failure where the template renders the old messages otherwise once new ones follow, as those do that drop
        the thinking of earlier turns: such a conversation is another one, to be encoded anew.
        """
        before = self._rendered(messages, tools, kwargs, False).text
        after = self._rendered([*messages, *new], tools, kwargs, add_generation_prompt).text
        if not after.startswith(before):
            raise Failure("the template changes earlier turns when new ones follow", next="encode the conversation anew")
        closing = self._closing(messages, before, tools, kwargs)
        added = self._ids(closing + after[len(before) :])
        most = len(self._ids(closing))
        present = next((n for n in range(min(most, len(ids)), 0, -1) if list(ids[-n:]) == added[:n]), 0)
        return added[present:]

    def example(self, messages: Messages, *, tools: Messages | None = None, kwargs: Mapping[str, Any] | None = None) -> Example:
        """A whole conversation for training. A token counts as the assistant's if its first character is.

        Raises UserError where the template neither marks the assistant's text with `{% generation %}` nor only ever appends.
        """
        if "endgeneration" in self.template.source:
            rendered = self._rendered(messages, tools, kwargs, False, track=True)
        else:
            rendered = self._by_prefixes(messages, tools, kwargs)
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        assistant = [any(first <= start < end for first, end in rendered.spans) for start in starts]
        return Example(list(encoded["input_ids"]), assistant)

    def _by_prefixes(self, messages: Messages, tools: Messages | None, kwargs: Mapping[str, Any] | None) -> Rendered:
        """The assistant's spans of a template without marks: what each of its turns adds to the opened turn."""
        whole = self._rendered(messages, tools, kwargs, False).text
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                opened = self._rendered(messages[:i], tools, kwargs, True).text
                closed = self._rendered(messages[: i + 1], tools, kwargs, False).text
                if not closed.startswith(opened) or not whole.startswith(closed):
                    raise UserError(
                        "the template does not say which text is the assistant's",
                        where=f"messages[{i}]",
                        expected="{% generation %} around it, or turns that only append",
                    )
                spans.append((len(opened), len(closed.rstrip())))  # what separates turns is not the assistant's
        return Rendered(whole, tuple(spans))

    def _closing(self, messages: Messages, text: str, tools: Messages | None, kwargs: Mapping[str, Any] | None) -> str:
        """What follows the last assistant message's own text in `text`; nothing if the last message is another's."""
        last = messages[-1]
        if last.get("role") != "assistant":
            return ""
        with_probe = {**last, "content": _PROBE, "tool_calls": None}
        rendered = self._rendered([*messages[:-1], with_probe], tools, kwargs, False).text
        closing = rendered.rpartition(_PROBE)[2]
        if not text.endswith(closing):
            raise Failure("the template closes a turn in several ways", next="encode the conversation anew")
        return closing

    def _rendered(
        self,
        messages: Messages,
        tools: Messages | None,
        kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        *,
        track: bool = False,
    ) -> Rendered:
        variables = {
            **self._specials,
            **checked_kwargs(kwargs),
            "messages": [self._harmless(m) for m in normalise(messages, developer=self._developer)],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self.template.render(variables, track=track)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                "the chat is not Unicode text", value=repr(rendered.text[error.start]), expected="no lone surrogate"
            ) from error
        return rendered

    def _harmless(self, message: dict[str, Any]) -> dict[str, Any]:
        """What users and tools write, without control tokens: a zero-width space in each keeps them from ending a turn."""
        if message["role"] not in ("user", "tool") or self._control is None:
            return message
        texts = {key: message[key] for key in ("content", "name", "tool_call_id") if key in message}
        return message | {key: self._control.sub(lambda m: f"{m[0][:1]}\u200b{m[0][1:]}", text) for key, text in texts.items()}

    def _ids(self, text: str) -> list[int]:
        # The template writes the special tokens that belong there.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """A tokenizer's special tokens, but for those that mark thinking and calls, which text may speak of."""
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    control = sorted((t for t in special if t not in MARKS and len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, control))) if control else None


def template_source(tokenizer: Any) -> str:
    """The chat template of a tokenizer's checkpoint; of several, the default one. Raises UserError where there is none."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if source is None:
        raise UserError(
            "the model has no chat template",
            where=tokenizer.name_or_path,
            expected="chat_template",
            next="openling generate MODEL PROMPT",
        )
    return str(source)
