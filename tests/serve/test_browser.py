"""The chat page in a real browser against the real server with a random nano model: what is typed is what the API is asked."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from server_process import API_KEY, Served

from browser import Page


@pytest.fixture
def page(browser: webdriver.Chrome, nano_server: Served) -> Iterator[Page]:
    """The page, its key entered, greedy and short."""
    page = Page(browser, nano_server.url + "/")
    page.open()
    page.browser.execute_script(
        "sessionStorage['openling.key'] = arguments[0];"
        "localStorage['openling.settings'] = JSON.stringify({temperature: 0, max_tokens: 24})",
        API_KEY,
    )
    page.open(fresh=False)
    page.complaints()
    yield page
    assert page.complaints() == []


def api(server: Served, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=30) as answer:
        text = answer.read().decode()
    return text if path == "/metrics" else json.loads(text)


def running(server: Served) -> float:
    lines = api(server, "/metrics").splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(("openling_running ", "openling_waiting ")))


def test_up_in_ten_seconds(nano_server: Served) -> None:
    """Of processor time, which other processes on the machine do not change."""
    assert nano_server.start_seconds < 10


def test_without_a_key_the_page_asks_for_it(browser: webdriver.Chrome, nano_server: Served) -> None:
    page = Page(browser, nano_server.url + "/")
    page.open()
    assert page.text("#model-name") == "no model"
    assert "asks for an API key" in page.text("#notice")
    page.click("#notice button")
    page.browser.switch_to.active_element.send_keys(API_KEY, Keys.TAB)
    page.until(lambda: page.text("#model-name") == "nano")
    assert page.text("#context") == "32K context"
    assert not page.one("#notice").is_displayed()


def test_a_reply_is_the_apis_own(page: Page, nano_server: Served) -> None:
    page.ask("Tell me.")
    page.ask("And now?")
    stored = page.browser.execute_script(
        "return JSON.parse(localStorage[Object.keys(localStorage).find((key) => key.startsWith('openling.chat.'))])"
    )
    asked = [{"role": m["role"], "content": m["content"]} for m in stored["messages"]]
    body = {"model": "nano", "temperature": 0, "max_tokens": 24, "chat_template_kwargs": {"enable_thinking": False}}
    for turn in (1, 3):
        answer = api(nano_server, "/v1/chat/completions", body | {"messages": asked[:turn]})
        assert stored["messages"][turn]["content"] == answer["choices"][0]["message"]["content"]
        assert stored["messages"][turn]["finish"] == answer["choices"][0]["finish_reason"]
        stats = stored["messages"][turn]["stats"]
        assert (stats["tokens"], stats["prompt"]) == (answer["usage"]["completion_tokens"], answer["usage"]["prompt_tokens"])
        assert stats["exact"]
    assert f"{stats['tokens']} tokens · " in page.stats()


@pytest.mark.parametrize("effort", ["none", "high", "xhigh"])
def test_every_effort_is_understood(page: Page, effort: str) -> None:
    page.click(f"#effort input[value={effort}] + span")
    page.send("go")
    page.done()
    assert "token" in page.stats(), page.text(".problem")
    assert page.one(".thinking").is_displayed() == (effort != "none")


def test_tools_are_understood(page: Page) -> None:
    tools = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]'
    page.browser.execute_script(
        "const s = JSON.parse(localStorage['openling.settings']); s.tools = arguments[0];"
        "localStorage['openling.settings'] = JSON.stringify(s)",
        tools,
    )
    page.open(fresh=False)
    page.send("weather?")
    page.done()
    assert "token" in page.stats(), page.text(".problem")


def test_stopping_frees_the_server(page: Page, nano_server: Served) -> None:
    page.browser.execute_script(
        "localStorage['openling.settings'] = JSON.stringify({temperature: 1, max_tokens: 20000, seed: 1})"
    )
    page.open(fresh=False)
    # Noise may end by itself at any token.
    page.browser.execute_script(
        "const send = window.fetch; window.fetch = (to, how) => send(to, how?.body"
        " ? {...how, body: JSON.stringify({...JSON.parse(how.body), ignore_eos: true})} : how)"
    )
    page.send("count for ever")
    page.until(lambda: running(nano_server) > 0)
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.until(lambda: not page.all(".message.running"))
    page.until(lambda: running(nano_server) == 0, 3)
    assert page.all(".problem")[-1].text.startswith("Stopped.")


def test_what_the_server_refuses_is_shown(page: Page) -> None:
    page.browser.execute_script("localStorage['openling.settings'] = JSON.stringify({max_tokens: 1e9})")
    page.open(fresh=False)
    page.send("too much")
    page.until(lambda: page.text(".problem"))
    assert "max_tokens" in page.text(".problem") or "context" in page.text(".problem")
