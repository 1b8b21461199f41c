"""openling: turns a softmax-attention checkpoint into a hybrid of Lightning Attention and MLA, and measures it.

`openling.load(folder)` reads any supported checkpoint folder; the import itself stays light.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openling.weights.folder import load as load

__version__ = version("openling")
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from openling.weights.folder import load

        return load
    raise AttributeError(f"module 'openling' has no attribute {name!r}")
