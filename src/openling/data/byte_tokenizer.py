"""A tokenizer without a vocabulary to learn: a token per byte, then end of text and marks of turns, calls and thinking."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|role_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
# Ling's roles; a thinking block first where the request asks for one.
TEMPLATE = """\
{%- for message in messages -%}
<role>{{ message.role | upper }}</role>{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}
</tool_call>{% endfor %}<|role_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<role>ASSISTANT</role>{% if enable_thinking %}<think>{% endif %}{% endif -%}
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes in the order of the byte alphabet, 256 the end of text, then the other special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[:3]])
    inner.add_tokens([AddedToken(token, normalized=False) for token in SPECIAL[3:]])
    special = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
