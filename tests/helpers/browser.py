"""Headless Chromium, driven by selenium."""

from __future__ import annotations

import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

# Continuous integration keeps what lies here.
SCREENSHOTS = Path(__file__).parents[2] / "build" / "report"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def open_browser() -> webdriver.Chrome:
    """Return a new browser; `make test` installs it where it is missing."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    assert browser, f"expected one of {', '.join(_BROWSERS)}: make browser"
    assert driver, "expected chromedriver: make browser"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Chromium has no sandbox for root, and little shared memory in a container.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def show(browser: webdriver.Chrome, page: Path, *, width: int = 1280, dark: bool = False) -> None:
    """Open a page at a width, in a theme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    browser.get(page.as_uri())


def keep_screenshot(browser: webdriver.Chrome, name: str) -> Path:
    """Write a screenshot of the whole page to `SCREENSHOTS`."""
    width, height = browser.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    assert browser.save_screenshot(str(path))
    return path
