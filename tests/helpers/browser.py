"""A real browser without a window: Debian's Chromium, driven by selenium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver")
WAIT_S = 60


@contextmanager
def browsing(width: int = 1200, height: int = 800) -> Iterator:
    """A browser of a size; below 500 pixels it says that it is a phone."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if width < 500:
        metrics = {"width": width, "height": height, "pixelRatio": 1}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_window_size(width, height)
        yield driver
    finally:
        driver.quit()


def until(driver, holds):
    """Wait until something holds, and return it."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    passing = (NoSuchElementException, StaleElementReferenceException)
    return WebDriverWait(driver, WAIT_S, poll_frequency=0.05, ignored_exceptions=passing).until(lambda _: holds())
