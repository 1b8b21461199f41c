"""A tokenizer of bytes, and small corpora built with it."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openling.data.build import BuildConfig, build
from openling.data.sources import Source

END = 256


def byte_tokenizer(end="<end>"):
    """A token per byte; ids 0-255 in the byte alphabet's order, 256 the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, end])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


TOKENIZER = byte_tokenizer()


def decode(ids):
    return TOKENIZER.decode([int(i) for i in ids if i != END])


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in rows))
    return path


def built(folder, name="corpus", *, workers=1, **texts):
    """A corpus of the named lists of texts or rows, one JSONL file each; changes of BuildConfig go in as `config_...`."""
    changes = {k.removeprefix("config_"): texts.pop(k) for k in list(texts) if k.startswith("config_")}
    sources = tuple(Source(n, str(jsonl(folder / f"{n}.jsonl", rows)), "MIT", "en") for n, rows in texts.items())
    build(BuildConfig(sources, **changes), folder / name, TOKENIZER, workers=workers)
    return folder / name
