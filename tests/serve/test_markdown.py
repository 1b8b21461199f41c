"""The page's Markdown in a real browser: what is drawn, that nothing else can be, and what hostile text costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from page_server import page_server
from selenium import webdriver

Draw = Callable[[str], str]


@pytest.fixture(scope="module")
def module(browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    with page_server() as (address, _):
        browser.get(address)
        browser.set_script_timeout(20)
        yield browser


@pytest.fixture
def draw(module: webdriver.Chrome) -> Draw:
    """HTML of the nodes for a text; classes and attributes of code blocks are left out."""

    def run(text: str) -> str:
        return module.execute_async_script(
            "const [text, done] = arguments; import('/web/markdown.js').then(({renderMarkdown}) => {"
            "const box = document.createElement('div'); renderMarkdown(box, text); done(box.innerHTML) }, done)",
            text,
        )

    return run


CASES = {
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "a\nb": "<p>a<br>b</p>",
    "# A\n## B #\n###### C": '<h3 class="h1">A</h3><h4 class="h2">B</h4><h6 class="h6">C</h6>',
    "#no heading": "<p>#no heading</p>",
    "**b** *i* ***bi*** __b__ _i_ ~~d~~": (
        "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em> <strong>b</strong> <em>i</em> <del>d</del></p>"
    ),
    "*a **b** c*": "<p><em>a <strong>b</strong> c</em></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "**重点：**内容": "<p><strong>重点：</strong>内容</p>",
    "un*closed **marks": "<p>un*closed **marks</p>",
    r"\*not\* \`code\`": "<p>*not* `code`</p>",
    "`a*b*` and `` ` ``": "<p><code>a*b*</code> and <code>`</code></p>",
    "open `tick": "<p>open `tick</p>",
    "- a\n- b\n  - c\n  - d\n- e": "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n\n   more\n2. b": "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>",
    "- a\n1. b": "<ul><li>a</li></ul><ol><li>b</li></ol>",
    "1. a\n   - b\n\ntext": "<ol><li>a<ul><li>b</li></ul></li></ol><p>text</p>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "$5 or $6": "<p>$5 or $6</p>",
    "$a_1 * b_1$ is": '<p><code class="math">$a_1 * b_1$</code> is</p>',
    r"\[ x_1 \]": r'<p><code class="math">\[ x_1 \]</code></p>',
    "| a | b |\n|---|--:|\n| 1 | `x|y` |\n| 2 |": (
        '<div class="table" tabindex="0"><table><thead><tr><th class="at-left">a</th><th class="at-right">b</th></tr></thead>'
        '<tbody><tr><td class="at-left">1</td><td class="at-right"><code>x|y</code></td></tr>'
        '<tr><td class="at-left">2</td><td class="at-right"></td></tr></tbody></table></div>'
    ),
    "a | b": "<p>a | b</p>",
}


@pytest.mark.parametrize("text", CASES)
def test_drawn(draw: Draw, text: str) -> None:
    assert draw(text) == CASES[text]


def test_code_blocks(draw: Draw) -> None:
    html = draw("```c++\nif (a < b)\n  *p = 1;\n\n- no list\n```\nafter")
    assert "<span>c++</span>" in html
    assert '<pre tabindex="0"><code>if (a &lt; b)\n  *p = 1;\n\n- no list</code></pre>' in html
    assert html.endswith("<p>after</p>")
    assert "<code>still open</code>" in draw("~~~\nstill open")
    assert "<code>```\ninner</code>" in draw("````\n```\ninner\n````")
    nested = draw("- item\n  ```py\n  x\n  ```\n- next")
    assert nested.count("<li>") == 2
    assert "<code>x</code>" in nested


def test_links(draw: Draw) -> None:
    html = draw("[a](https://b.c/d_(e)) <https://f.g> https://h.i/j. ![pic](https://k.l/m.png)")
    assert html.count('target="_blank" rel="noopener noreferrer nofollow"') == 4
    for address in ("https://b.c/d_(e)", "https://f.g", "https://h.i/j", "https://k.l/m.png"):
        assert f'href="{address}"' in html
    assert "<img" not in html


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](JAVASCRIPT:alert(1))",
        "[a](data:text/html,x)",
        "[a](//evil.example)",
        "![a](javascript:alert(1))",
        "`<b>`",
        '```"><script>\n</code><script>x</script>\n```',
        "| <i> |\n|---|\n| <u> |",
        "# <iframe>",
        "- <style>*{}</style>",
    ],
)
def test_nothing_of_the_models_becomes_markup(module: webdriver.Chrome, draw: Draw, text: str) -> None:
    draw(text)
    names = module.execute_async_script(
        "const [text, done] = arguments; import('/web/markdown.js').then(({renderMarkdown}) => {"
        "const box = document.createElement('div'); renderMarkdown(box, text);"
        "done([...box.querySelectorAll('*')].map((node) => [node.tagName, node.getAttribute('href')])) }, done)",
        text,
    )
    allowed = {"P", "CODE", "PRE", "FIGURE", "FIGCAPTION", "SPAN", "BUTTON", "H3", "UL", "LI"}
    allowed |= {"DIV", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"}
    assert {name for name, _ in names} <= allowed
    assert all(href is None for _, href in names)


HOSTILE = [
    "*",
    "*a ",
    "**a ",
    "_a_",
    "[",
    "[](",
    "`",
    "``` `",
    "> ",
    "- ",
    "|",
    "|-",
    "\\",
    "$a",
    "\\(",
    "~~",
    "* ",
    "1. ",
    "<",
    "https://",
]
HOSTILE += ["*a" * 2 + "*", "[a](b", "\n- a\n  ", "\n> > > ", "\n|a|\n|-|\n", "\n```\n", "\n# ", "a*b_", "![", "`a` "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_costs_no_more_than_its_length(module: webdriver.Chrome, piece: str) -> None:
    """A scan of the whole rest at each of 60,000 characters would take minutes."""
    took = module.execute_async_script(
        "const [piece, done] = arguments; import('/web/markdown.js').then(({renderMarkdown}) => {"
        "const text = piece.repeat(Math.ceil(60000 / piece.length)); const box = document.createElement('div');"
        "const begun = performance.now(); renderMarkdown(box, text); done(performance.now() - begun) }, done)",
        piece,
    )
    assert took < 3000, f"{took} ms"


def test_text_that_grows_is_drawn_as_if_it_had_come_at_once(module: webdriver.Chrome, draw: Draw) -> None:
    text = "\n\n".join(CASES) + "\n\n```py\nx = 1\n```\n\nend"
    grown, kept = module.execute_async_script(
        "const [text, done] = arguments; import('/web/markdown.js').then(({renderMarkdown}) => {"
        "const box = document.createElement('div'); renderMarkdown(box, text.slice(0, 60)); const first = box.firstChild;"
        "for (let i = 61; i <= text.length; i += 7) renderMarkdown(box, text.slice(0, i));"
        "renderMarkdown(box, text); done([box.innerHTML, box.firstChild === first]) }, done)",
        text,
    )
    assert grown == draw(text)
    assert kept  # finished blocks are not drawn again: a selection in them survives


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_events_whatever_the_pieces(module: webdriver.Chrome, cut: int) -> None:
    text = 'data: {"a": "é中"}\r\n\r\n: comment\n\ndata:x\ndata: y\n\nevent: e\rdata: z\r\rdata: unfinished'
    found = module.execute_async_script(
        "const [text, cut, done] = arguments; import('/web/api.js').then(async ({events}) => {"
        "const bytes = new TextEncoder().encode(text); const stream = new ReadableStream({start(c) {"
        "for (let i = 0; i < bytes.length; i += cut) c.enqueue(bytes.slice(i, i + cut)); c.close() }});"
        "const found = []; for await (const event of events(stream)) found.push(event); done(found) }, done)",
        text,
        cut,
    )
    assert found == ['{"a": "é中"}', "x\ny", "z"]
