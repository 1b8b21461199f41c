"""Triton's interpreter without its repetitions: the same numpy operations, several times as fast.

Every call of a jitted function inside a kernel patches `triton.language` anew, by a walk over all its members: once per launch is
enough. A reduction by a function of ours takes one element at a time, each wrapped as a tensor of its own: here all neighbours
are joined at once, as hardware does it (Triton leaves the order open).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    tl = interpreter.tl
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    def patch_once(fn: Any) -> Any:
        """Nothing where this launch has patched what `fn` sees already; a launch restores what it has patched."""
        seen = tuple(sorted({id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}))
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch_lang(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def reduced(self: Any, input: Any) -> Any:
        """As `generic_reduce`: the combining function sees neighbours in their order, halves of the axis at a time."""
        length = 0 if self.axis is None else input[0].handle.data.shape[self.axis]
        if length & (length - 1) or not length:
            return one_by_one(self, input)
        acc = tuple(self.to_tensor(np.moveaxis(x.handle.data, self.axis, 0), x.dtype) for x in input)
        while len(acc[0].handle.data) > 1:
            halves = [tuple(self.to_tensor(x.handle.data[i::2], x.dtype) for x in acc) for i in range(2)]
            found = self.combine_fn.fn(*halves[0], *halves[1])
            acc = found if isinstance(found, tuple) else (found,)
        kept = [np.expand_dims(x.handle.data[0], self.axis) if self.keep_dims else x.handle.data[0] for x in acc]
        return [self.to_tensor(x, t.dtype) for x, t in zip(kept, input, strict=True)]

    one_by_one = interpreter.ReduceOps.generic_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter.ReduceOps, "generic_reduce", reduced)
        yield
