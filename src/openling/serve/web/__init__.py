"""The chat page: plain HTML, CSS and JavaScript modules, served as they are; nothing is built or loaded from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_MEDIA_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_MEDIA_TYPES |= {"svg": "image/svg+xml"}

# Sent with every file of the page. What a model writes is shown as text and can load nothing, even if the renderer had a hole.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    content: bytes
    media_type: str


@cache
def page_files() -> dict[str, PageFile]:
    """URL path -> file: `/` is the page, `/web/...` what it loads. They need no key; what the page asks for does."""
    found = {}
    for file in files(__name__).iterdir():
        media_type = _MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type:
            path = "/" if file.name == "index.html" else f"/web/{file.name}"
            found[path] = PageFile(file.read_bytes(), media_type)
    return found
