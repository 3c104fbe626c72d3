"""A real browser, for tests of web pages: Chromium of the system (`apt-get install chromium`).

Without Chromium the tests are skipped, but under CI that is an error. Pictures are kept in `test-output/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.end_to_end.conftest import REPOSITORY

PICTURES = REPOSITORY / "test-output"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREENS: dict[str, Any] = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 800}}
Opened = Callable[..., Page]
PATIENCE = 60_000
"""Milliseconds to wait for a page: other tests have the machine too."""


@pytest.fixture(scope="session", autouse=True)
def installed() -> str:
    """The browser's program, looked for before a sweep is run to look at."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        missing = f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)"
        raise pytest.fail.Exception(missing) if os.environ.get("CI") else pytest.skip.Exception(missing)
    return found


@pytest.fixture(scope="session")
def browser(installed: str) -> Iterator[Browser]:
    PICTURES.mkdir(exist_ok=True)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=installed) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own: MLflow's keeps the rows of an address that differs behind the `#` alone."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE)
    # MLflow's assistant opens by itself on a first visit, over a quarter of the page.
    page.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    yield page
    page.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Opens a page from disk; at the end nothing may have gone wrong there, and nothing have been requested."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, screen: str = "wide", address: str = "", **options: Any) -> Page:
        context = browser.new_context(viewport=SCREENS[screen], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda one: wrong.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
        page.goto(path.as_uri() + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
