"""Real English text for training runs: the documentation in Debian's packages, as one JSONL file per package.

    python benchmarks/fetch_text.py FOLDER [PACKAGE ...]      needs apt-get, dpkg-deb and lxml

Each line is {"id", "text", "source", "license"}: what `openling data build` and `openling migrate --text` read. Nothing of it is
part of openling: every package keeps its licence, named here as its copyright file does in short.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lxml.html
from lxml import etree

PACKAGES = {
    "anarchism": "GFDL-1.1 or GPL-2+",
    "c++-annotations-html": "GPL-2+",
    "debian-handbook": "CC-BY-SA-3.0 or GPL-2+",
    "debian-policy": "GPL-2+",
    "developers-reference": "GPL-2+",
    "git-doc": "GPL-2",
    "gnome-user-docs": "CC-BY-SA-3.0",
    "installation-guide-amd64": "GPL-2+",
    "libreoffice-help-en-us": "MPL-2.0",
    "linux-doc-6.1": "GPL-2",
    "manpages": "GPL-2+ and others",
    "manpages-dev": "GPL-2+ and others",
    "maxima-doc": "GPL-2+",
    "nodejs-doc": "MIT",
    "octave-doc": "GPL-3+",
    "perl-doc": "Artistic or GPL-1+",
    "postgresql-doc-15": "PostgreSQL",
    "python-django-doc": "BSD-3-Clause",
    "python-scipy-doc": "BSD-3-Clause",
    "python-sympy-doc": "BSD-3-Clause",
    "python3.11-doc": "PSF-2.0",
    "racket-doc": "MIT or Apache-2.0",
    "rust-doc": "MIT or Apache-2.0",
    "sagemath-doc": "CC-BY-SA-3.0",
    "sqlite3-doc": "public domain",
    "vim-doc": "Vim",
}
TEXT = (".txt", ".md", ".rst", ".pod", ".markdown")
PAGES = (".html", ".htm", ".xhtml", ".page")
# Translations, generated lists and sources of pages that are there as pages too.
LEFT_OUT = re.compile(
    r"(/|\.)(?!en\b)(de|fr|es|it|ja|pt|pt-br|pt_BR|ru|zh|zh-cn|zh_CN|cs|da|el|fi|hu|ko|nl|pl|ro|sv|tr|uk|vi|id|nb|ar|ca|gl|lt|sr)(/|\.html?$)"
    r"|/C/legal|genindex|/_sources/|/_static/|_modules/|/search\.html|copyright$|changelog"
)
HEADINGS = {f"h{n}" for n in range(1, 7)}
BLOCKS = {"p", "div", "li", "tr", "pre", "br", "dt", "dd", "table", "section", "title", "blockquote"} | HEADINGS
NOISE = "|".join(
    ("//script", "//style", "//nav", "//footer", "//head", "//*[@role='navigation']", "//div[contains(@class,'sidebar')]")
)
SHORTEST, LONGEST = 400, 400_000
MOST = 40_000_000  # characters of one package: none may drown the others


def prose(raw: bytes) -> str:
    """A page's text, a line per block; what is preformatted keeps its own lines."""
    try:
        page = lxml.html.fromstring(raw)
    except (etree.ParserError, ValueError):
        return ""
    for node in page.xpath(NOISE):
        if node.getparent() is not None:
            node.drop_tree()
    parts: list[str] = []
    kept = 0  # how many <pre> are open
    for event, node in etree.iterwalk(page, events=("start", "end")):
        block, text = node.tag in BLOCKS, node.text if event == "start" else node.tail
        if event == "start":
            kept += node.tag == "pre"
            parts.append("\n" if block else "")
        else:
            kept -= node.tag == "pre"
            parts.append("\n" if block else "")
        if isinstance(node.tag, str) or event == "end":
            parts.append((text or "") if kept else re.sub(r"\s+", " ", text or ""))
    lines = (line.rstrip() for line in "".join(parts).replace("¶", "").splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def manual(raw: bytes) -> str:
    """A manual page without its troff requests."""
    lines = raw.decode(errors="replace").splitlines()
    kept = (
        re.sub(r"\\f.|\\&|\\-", lambda m: "-" if m[0] == "\\-" else "", line)
        for line in lines
        if not line.startswith(('.\\"', "'\\\""))
    )
    plain = (re.sub(r"^\.(SH|SS|B|I|BR|IR|RB|BI|TP|PP|IP|TH)\b ?", "", line).strip('"') for line in kept)
    return "\n".join(line for line in plain if not line.startswith("."))


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every readable English file."""
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        name = str(path.relative_to(root))
        if LEFT_OUT.search("/" + name):
            continue
        raw = path.read_bytes()
        bare = name.removesuffix(".gz")
        if bare != name:
            raw = gzip.decompress(raw)
        if bare.endswith(PAGES):
            yield name, prose(raw)
        elif re.search(r"/man\d/", name):
            yield name, manual(raw)
        elif bare.endswith(TEXT):
            yield name, raw.decode(errors="replace")


def fetch(package: str, out: Path) -> tuple[int, int]:
    """Download one package and write its texts; documents and characters."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        archive = next(Path(folder).glob("*.deb"))
        root = Path(folder) / "root"
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
        seen: set[int] = set()
        documents = characters = 0
        with (out / f"{package}.jsonl").open("w") as file:
            for name, text in texts(root):
                if not SHORTEST <= len(text) <= LONGEST or hash(text) in seen:
                    continue
                seen.add(hash(text))
                row = {
                    "id": f"{package}/{name}",
                    "text": text,
                    "source": package,
                    "license": PACKAGES.get(package, "see package"),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                documents, characters = documents + 1, characters + len(text)
                if characters > MOST:
                    break
    return documents, characters


def main() -> None:
    """All packages, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", nargs="*", default=list(PACKAGES))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for package in args.packages:
        documents, characters = fetch(package, args.folder)
        print(f"{package}: {documents:,} documents, {characters / 1e6:,.1f} M characters", flush=True)


if __name__ == "__main__":
    main()
