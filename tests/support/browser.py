"""Headless Chromium for the page's tests, and the playground's command that serves the page."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAVE_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
MISSING = " and ".join(
    name for name, have in (("Playwright", HAVE_PLAYWRIGHT), ("Chromium", CHROMIUM)) if not have
)
FLAGS = [
    "--no-sandbox",  # root in a container needs it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a fresh profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def playground(*arguments: str) -> Iterator[str]:
    """Address of a page that `lora-drop playground` serves in its own process."""
    command = [str(Path(sys.executable).with_name("lora-drop")), "playground", "--port", "0"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Playground: "):
                yield line.split()[1]
                break
        else:
            raise RuntimeError(f"lora-drop playground ended with {process.wait()}")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) is not None
