"""Headless Chromium for the tests of the chat page and of the report, and what the former do in it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = [f"--disable-{name}" for name in ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")]
FLAGS += ["--headless=new", "--no-sandbox", "--no-first-run", "--window-size=1280,860", "--lang=en"]


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A fresh browser; skips the test, with a warning, where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        warnings.warn("THE PAGES ARE NOT TESTED: no chromium and chromedriver (apt-get install chromium-driver)", stacklevel=2)
        pytest.skip("no chromium or no chromedriver on this machine")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """The chat page in a browser."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser = browser
        self.address = address

    def open(self, *, fresh: bool = True) -> None:
        """Load the page; fresh: with nothing remembered."""
        self.browser.get(self.address)
        if fresh:
            self.browser.execute_script("localStorage.clear(); sessionStorage.clear()")
            self.browser.get(self.address)
        self.until(lambda: self.text("#model-name") != "connecting…")

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.one(css).text

    def click(self, css: str) -> None:
        self.one(css).click()

    def until(self, ready: Callable[[], object], seconds: float = 60) -> None:
        """Wait for something to become true."""
        wait = WebDriverWait(self.browser, seconds, 0.03, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda _: ready())

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def done(self, seconds: float = 60) -> None:
        """Wait for the end of a reply."""
        self.until(lambda: self.all(".message.reply") and not self.all(".message.running"), seconds)

    def ask(self, text: str, seconds: float = 60) -> str:
        """Send, wait, and return the last reply's text."""
        before = len(self.all(".message"))
        self.send(text)
        self.until(lambda: len(self.all(".message")) == before + 2)
        self.done(seconds)
        return self.all(".message.reply")[-1].find_element(By.CSS_SELECTOR, ".md.reply").text

    def stats(self) -> str:
        """The line below the last reply."""
        return self.all(".stats")[-1].text

    def complaints(self) -> list[str]:
        """What the browser logged since the last look, without the errors of requests that a test provokes."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["source"] != "network"]
