"""The page of a full run in a real browser, light and dark, wide and narrow: all texts can be read, nothing is fetched."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from test_page import full_report, write_run

from openling.report import build

if TYPE_CHECKING:
    from selenium import webdriver

# Colours of all texts, in page and plots, and what they stand on; what is outside of the page's width.
LOOK = """
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!/^rgba.*, 0\\)|transparent/.test(c)) return c; } return getComputedStyle(document.body).backgroundColor; };
const texts = [...document.querySelectorAll("body *")].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
  && e.getBoundingClientRect().height && !e.closest("style"));
return {colours: texts.map(e => [e.textContent.trim().slice(0, 40), e.closest("svg") ? getComputedStyle(e).fill
  : getComputedStyle(e).color, ground(e)]),
  over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  wide: [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg")
    && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80)),
  entries: performance.getEntriesByType("resource").map(r => r.name)};
"""


def luminance(colour: str) -> float:
    """Of sRGB, as WCAG 2 has it."""
    numbers = [float(n) for n in re.findall(r"[\d.]+", colour.replace("srgb", ""))[:3]]
    parts = [n if colour.startswith("color(") else n / 255 for n in numbers]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(write_run(tmp_path_factory.mktemp("run"), full_report())).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(scheme: str, address: str, browser: webdriver.Chrome) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    seen: dict[int, Any] = {}
    try:
        for width in (1280, 390):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(address)
            seen[width] = browser.execute_script(LOOK)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert [(look["over"], look["wide"]) for look in seen.values()] == [(0, []), (0, [])]
    assert seen[1280]["entries"] == []
    assert len(seen[1280]["colours"]) > 400
    # 4.5 is WCAG's bound for small text; coloured names in plots and the numbers of layers have that of graphics, 3.
    faint = [row for row in seen[1280]["colours"] if contrast(row[1], row[2]) < 3]
    assert faint == []
    small = [row for row in seen[1280]["colours"] if contrast(row[1], row[2]) < 4.5]
    assert {row[1] for row in small} <= {"rgb(199, 119, 0)", "rgb(255, 255, 255)"}
    dark = luminance(seen[1280]["colours"][0][2]) < 0.1
    assert dark == (scheme == "dark")
