"""The chat page in a real browser, against a server that does what the test says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from page_server import Script, page_server
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from browser import Page


@pytest.fixture(scope="module")
def address_and_script() -> Iterator[tuple[str, Script]]:
    with page_server() as served:
        yield served


@pytest.fixture
def script(address_and_script: tuple[str, Script]) -> Script:
    script = address_and_script[1]
    script.__init__()  # type: ignore[misc]
    return script


@pytest.fixture
def page(browser: webdriver.Chrome, address_and_script: tuple[str, Script], script: Script) -> Iterator[Page]:
    page = Page(browser, address_and_script[0])
    page.open()
    page.complaints()
    yield page
    assert page.complaints() == []  # no error, and nothing that the Content-Security-Policy had to stop


def test_a_conversation(page: Page, script: Script) -> None:
    script.say("Hello **you**.")
    assert page.text("#model-name") == "ring-nano"
    assert page.text("#context") == "8K context"
    assert page.ask("hi") == "Hello you."
    assert page.all(".md.reply strong")[-1].text == "you"
    assert page.stats().startswith("5 tokens · ")
    assert "first token 0." in page.stats()
    assert page.stats().endswith("prompt 1,204 (1,024 cached)")
    assert page.text("#meter") == "1,209 of 8,192 tokens of context used"
    page.ask("and again")
    sent = [(message["role"], message["content"]) for message in script.bodies[-1]["messages"]]
    assert sent == [("user", "hi"), ("assistant", "Hello **you**."), ("user", "and again")]
    assert script.bodies[-1]["stream"] is True
    assert {"temperature", "max_tokens", "tools", "seed"} & script.bodies[-1].keys() == set()
    page.open(fresh=False)  # kept over a reload
    assert [message.text for message in page.all(".bubble")] == ["hi", "and again"]


def test_text_streams_and_thinking_is_folded_away(page: Page, script: Script) -> None:
    first, second = threading.Event(), threading.Event()
    script.stream({"reasoning_content": "let me *see*"}, first, {"content": "so"}, second, {"content": " be it"})
    page.send("think")
    page.until(lambda: "Thinking…" in page.text(".thinking summary"))
    assert page.one(".thinking").get_property("open") is False
    assert page.all(".thinking .md em") == []
    first.set()
    page.until(lambda: page.text(".md.reply") == "so")
    assert page.text(".thinking summary").startswith("Thought")
    page.click(".thinking summary")
    page.until(lambda: [em.text for em in page.all(".thinking .md em")] == ["see"])  # the browser tells of the click later
    second.set()
    page.done()
    assert page.text(".md.reply") == "so be it"


@pytest.mark.parametrize(
    ("effort", "sent"),
    [
        ("none", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("high", {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": True}}),
        ("xhigh", {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "xhigh"}}),
    ],
)
def test_effort(page: Page, script: Script, effort: str, sent: dict[str, Any]) -> None:
    script.say("ok")
    page.click(f"#effort input[value={effort}] + span")
    page.ask("go")
    body = script.bodies[-1]
    assert {key: body[key] for key in ("chat_template_kwargs", "reasoning_effort") if key in body} == sent


def test_settings_are_sent_and_kept(page: Page, script: Script) -> None:
    script.say("ok")
    page.click("#toggle-settings")
    for name, value in {"temperature": "0.5", "top_k": "40", "seed": "-3", "max_tokens": "0", "system": "Be brief."}.items():
        page.one(f"[name={name}]").send_keys(value)
    assert page.one("[name=max_tokens]").get_attribute("aria-invalid") == "true"
    page.one("#api-key").send_keys("secret", Keys.TAB)
    page.until(lambda: script.keys[-1] == "Bearer secret")
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.one("#settings").is_displayed()
    page.ask("go")
    body = script.bodies[-1]
    assert {key: body.get(key) for key in ("temperature", "top_k", "seed", "max_tokens")} == {
        "temperature": 0.5,
        "top_k": 40,
        "seed": -3,
        "max_tokens": None,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert script.keys[-1] == "Bearer secret"
    stored = page.browser.execute_script("return JSON.stringify(localStorage)")
    assert "secret" not in stored
    page.open(fresh=False)
    page.click("#toggle-settings")
    assert page.one("[name=temperature]").get_property("value") == "0.5"
    assert page.one("#api-key").get_property("value") == "secret"
    page.click("#reset")
    page.click("#close-settings")
    page.ask("go")
    assert "temperature" not in script.bodies[-1]


WEATHER = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'


def test_tool_calls_are_shown_and_answered(page: Page, script: Script) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        named = {"id": f"c{index}", "type": "function"} if "name" in function else {}
        return {"tool_calls": [{"index": index, "function": function} | named]}

    script.stream(
        {"content": None},
        call(0, name="weather", arguments='{"city": '),
        call(0, arguments='"<b>Paris</b>"}'),
        call(1, name="time", arguments="{}"),
    )
    script.say("Sunny.")
    page.browser.execute_script(f"localStorage['openling.settings'] = JSON.stringify({{tools: {WEATHER!r}}})")
    page.open(fresh=False)
    page.send("weather?")
    page.done()
    assert script.bodies[-1]["tools"][0]["function"]["name"] == "weather"
    assert [name.text for name in page.all(".call-name")] == ["weather", "time"]
    assert page.all(".call .tool-text")[0].text == '{\n  "city": "<b>Paris</b>"\n}'
    for answer, text in zip(page.all(".call .answer"), ("24 degrees", "noon"), strict=True):
        answer.send_keys(text)
    page.click(".send-results")
    page.until(lambda: len(page.all(".message")) == 5)
    page.done()
    call_message, *results = script.bodies[-1]["messages"][1:]
    assert [call["function"]["arguments"] for call in call_message["tool_calls"]] == ['{"city": "<b>Paris</b>"}', "{}"]
    assert results == [
        {"role": "tool", "tool_call_id": "c0", "content": "24 degrees"},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert page.all(".call .answer") == []


def test_tools_that_are_not_json_are_not_sent(page: Page, script: Script) -> None:
    page.click("#toggle-settings")
    page.one("[name=tools]").send_keys("[{")
    assert "not JSON" in page.text("#tools-problem")
    page.click("#close-settings")
    page.send("go")
    page.until(lambda: "not JSON" in page.text(".problem"))
    assert script.bodies == []


def test_stop_aborts_the_request_and_keeps_the_text(page: Page, script: Script) -> None:
    script.stream({"content": "one"}, threading.Event())
    page.send("count")
    page.until(lambda: page.text(".md.reply") == "one")
    assert page.one("#send").get_attribute("aria-label") == "Stop"
    page.click("#send")
    page.done()
    assert script.gone.wait(3)
    assert page.text(".problem").startswith("Stopped.")
    assert page.text(".md.reply") == "one"
    script.gone.clear()
    page.send("again")
    page.until(lambda: len(page.all(".message")) == 4 and page.all(".md.reply")[-1].text == "one")
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.done()
    assert script.gone.wait(3)


def test_edit_and_retry(page: Page, script: Script) -> None:
    script.say("first")
    script.say("second")
    script.say("third")
    page.ask("one")
    page.one(".reply .actions button[aria-label='Try again']").click()
    page.until(lambda: page.text(".md.reply") == "second")
    page.done()
    page.browser.execute_script("document.querySelector('.user .actions button[aria-label=Edit]').click()")
    area = page.browser.switch_to.active_element
    assert area.get_property("value") == "one"
    area.send_keys(" more", Keys.ENTER)
    page.until(lambda: page.text(".md.reply") == "third")
    page.done()
    assert [body["messages"][-1]["content"] for body in script.bodies] == ["one", "one", "one more"]
    assert len(page.all(".message")) == 2


def test_several_conversations(page: Page, script: Script) -> None:
    hold = threading.Event()
    script.stream({"content": "slow"}, hold, {"content": " reply"})
    script.say("other")
    page.send("first chat")
    page.until(lambda: page.text(".md.reply") == "slow")
    page.click("#new-chat")
    assert page.ask("second chat") == "other"
    hold.set()  # the first goes on while another is open
    page.until(lambda: not page.all(".chats .busy"))
    assert [chat.text for chat in page.all(".chat")] == ["second chat", "first chat"]
    page.all(".chat")[1].click()
    assert page.text(".md.reply") == "slow reply"
    row = page.all(".chats li")[1]
    page.browser.execute_script("arguments[0].click()", row.find_element(By.CSS_SELECTOR, ".ghost"))
    assert len(page.all(".chat")) == 2  # the first click only asks
    page.browser.execute_script("arguments[0].click()", row.find_element(By.CSS_SELECTOR, ".ghost"))
    assert [chat.text for chat in page.all(".chat")] == ["second chat"]
    assert page.one("#welcome").is_displayed()
    page.open(fresh=False)
    assert [chat.text for chat in page.all(".chat")] == ["second chat"]


@pytest.mark.parametrize(
    ("status", "headers", "message", "expected"),
    [
        (401, {}, "bad key", "asks for an API key"),
        (429, {"Retry_After": "7"}, "busy", "Try again in 7 s."),
        (503, {"Retry_After": "3"}, "draining", "starting or shutting down"),
        (400, {}, "maximum context length is 8192 tokens", "maximum context length is 8192 tokens"),
        (500, {}, "", "answered 500"),
    ],
)
def test_refusals_say_what_to_do(
    page: Page, script: Script, status: int, headers: dict[str, str], message: str, expected: str
) -> None:
    script.refuse(status, message, **headers)
    script.say("fine now")
    page.send("hello")
    page.until(lambda: expected in page.text(".problem"))
    if status == 401:
        page.one(".problem button").click()
        assert page.browser.switch_to.active_element.get_attribute("id") == "api-key"
        page.click("#close-settings")
    page.all(".problem button")[-1].click()
    page.until(lambda: page.text(".md.reply") == "fine now")
    page.done()
    assert not page.one(".problem").is_displayed()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"content": "half"}, ConnectionError], "ended before the reply was complete"),
        ([{"content": "half"}, b'data: {"error": {"message": "out of memory"}}\n\n', ConnectionError], "out of memory"),
        ([{"content": "half"}, b"data: <html>\n\n", ConnectionError], "not JSON"),
    ],
)
def test_a_stream_that_breaks_keeps_what_came(page: Page, script: Script, steps: list[Any], expected: str) -> None:
    script.stream(*steps)
    page.send("hello")
    page.until(lambda: expected in page.text(".problem"))
    assert page.text(".md.reply") == "half"


def test_a_server_that_is_away_is_found_again(page: Page, script: Script) -> None:
    script.models = (503, {"error": {"message": "loading"}})
    page.browser.get(page.address)
    page.until(lambda: "starting or shutting down" in page.text("#notice"))
    assert page.text("#model-name") == "no model"
    script.models = (200, {"data": [{"id": "here"}]})
    page.until(lambda: page.text("#model-name") == "here")
    assert not page.one("#notice").is_displayed()


def test_an_answer_without_text_says_so(page: Page, script: Script) -> None:
    script.stream()
    page.send("hello")
    page.until(lambda: "without an answer" in page.text(".problem"))


def test_the_keyboard_reaches_everything(page: Page, script: Script) -> None:
    script.say("ok")
    page.ask("hello")
    names = []
    page.browser.execute_script("document.querySelector('.skip').focus()")
    for _ in range(30):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        active = page.browser.switch_to.active_element
        names.append(active.get_attribute("id") or active.get_attribute("aria-label") or active.get_attribute("class"))
        label = active.accessible_name
        assert label, f"{active.get_attribute('outerHTML')} has no name"
        if names[-1] == "prompt":
            break
    for expected in ("new-chat", "chat", "theme", "toggle-settings", "Copy", "Edit", "Copy reply", "Try again", "prompt"):
        assert expected in names, names


def test_small_screens(page: Page, script: Script) -> None:
    script.say("| a | b |\n|---|---|\n| " + "wide " * 40 + "| 2 |\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300)
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.open()
        page.ask("hello")
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 360
        assert page.browser.execute_script("return document.querySelector('#messages').getBoundingClientRect().right <= 360")
        assert not page.one("#new-chat").is_displayed()
        page.click("#toggle-sidebar")
        page.until(lambda: page.one("#new-chat").is_displayed())
        page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        page.until(lambda: not page.one("#new-chat").is_displayed())
        assert page.one("#toggle-settings").is_displayed()
        assert page.browser.execute_script("return document.querySelector('.md td').offsetHeight") < 400  # no words one by one
        script.__init__()  # type: ignore[misc]
        script.refuse(400, "the prompt is wrong: " + "x" * 300)
        page.send("again")
        page.until(lambda: page.text(".message:last-child .problem"))
        assert (
            page.browser.execute_script("const s = document.querySelector('#scroller'); return s.scrollWidth - s.clientWidth")
            == 0
        )
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    values = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


PAIRS = [("ink", "paper"), ("soft", "paper"), ("faint", "paper"), ("faint", "side"), ("soft", "code"), ("soft", "bubble")]
PAIRS += [("jade", "raised"), ("jade", "paper"), ("jade-ink", "jade"), ("warn", "warn-wash"), ("bad", "raised"), ("paper", "ink")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(page: Page, theme: str) -> None:
    for _ in range(3):
        if page.browser.execute_script("return document.documentElement.dataset.theme") == theme:
            break
        page.click("#theme")
    for text, ground in PAIRS:
        colours = page.browser.execute_script(
            "const probe = document.createElement('i'); document.body.append(probe);"
            "const read = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color };"
            "const found = [read(arguments[0]), read(arguments[1])]; probe.remove(); return found",
            text,
            ground,
        )
        light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, text, ground, colours)  # WCAG 2 level AA


def test_a_long_reply_follows_and_lets_go(page: Page, script: Script) -> None:
    hold = threading.Event()
    script.stream({"content": "line\n\n" * 100}, hold, {"content": "the end"})
    page.send("long")
    page.until(lambda: len(page.all(".md.reply p")) == 100)
    bottom = "const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight"
    page.until(lambda: page.browser.execute_script(bottom) < 2)
    page.one("#prompt").send_keys("a", *(Keys.SHIFT, Keys.ENTER) * 3)  # a higher field does not hide the newest lines
    page.until(lambda: page.browser.execute_script(bottom) < 2)
    page.browser.execute_script("document.querySelector('#scroller').scrollTop = 0")
    page.until(lambda: page.one("#to-end").is_displayed())
    hold.set()
    page.done()
    assert page.browser.execute_script("return document.querySelector('#scroller').scrollTop") == 0
    page.click("#to-end")
    assert page.browser.execute_script(bottom) < 2


def test_full_storage_is_said(page: Page, script: Script) -> None:
    script.say("ok")
    page.browser.execute_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page.ask("hello")
    assert "not kept" in page.text("#notice")


def test_damaged_storage_is_survived(page: Page, script: Script) -> None:
    page.browser.execute_script(
        "localStorage['openling.chat.a'] = '{'; localStorage['openling.chat.b'] = '7'; localStorage['openling.settings'] = 'null'"
    )
    script.say("ok")
    page.open(fresh=False)
    assert page.ask("hello") == "ok"


def test_copying(page: Page, script: Script) -> None:
    script.say("```python\nprint('<b>')\n```")
    page.ask("code")
    page.browser.execute_script("navigator.clipboard.writeText = (text) => { window.copied = text }")
    page.click(".copy-code")
    assert page.browser.execute_script("return window.copied") == "print('<b>')"
    page.click("button[aria-label='Copy reply']")
    assert page.browser.execute_script("return window.copied").startswith("```python")


def test_two_tabs_see_each_other(page: Page, script: Script) -> None:
    script.say("ok")
    page.ask("from the first tab")
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    try:
        page.open(fresh=False)
        page.click("#new-chat")
        page.ask("from the second tab")
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    page.until(lambda: [chat.text for chat in page.all(".chat")] == ["from the second tab", "from the first tab"])
