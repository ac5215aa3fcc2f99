"""Pictures of the playground for docs/: the demo's model, light and dark.

Run by `make screenshots`. What they show is what this machine measures while they are taken.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import MISSING, chromium, playground  # noqa: E402

PROMPT = "Explain what a computer program is."
TOKENS = 88
SIZE = {"width": 1200, "height": 1200}


def picture(browser: Any, address: str, scheme: str, target: Path) -> None:
    """One answered prompt, the card of an underlined token open."""
    page = browser.new_page(viewport=SIZE, color_scheme=scheme, device_scale_factor=1.5)
    page.goto(f"{address}/#max_tokens={TOKENS}")
    ask(page)  # the first steps of a server are slower
    page.click("#new")
    ask(page)
    tokens = page.query_selector_all("#lora .token.lora.unlikely")
    tokens[len(tokens) // 2].hover()
    bottom = page.evaluate(
        "Math.max(...['.columns', '#card'].map("
        "(part) => document.querySelector(part).getBoundingClientRect().bottom))"
    )
    clip = {"x": 0, "y": 0, "width": SIZE["width"], "height": bottom + 16}
    page.screenshot(path=target, clip=clip)
    page.close()
    print(target)


def ask(page: Any) -> None:
    """Asks the prompt and waits for both answers."""
    page.fill("#prompt", PROMPT)
    page.click("#run")
    page.wait_for_selector("#status:has-text('Both have answered')", state="attached", timeout=0)


def main() -> None:
    """Take both."""
    if MISSING:
        raise SystemExit(f"{MISSING} not installed; make screenshots installs what is missing")
    with playground("--dtype", "float32") as address, chromium() as browser:
        for scheme in ("light", "dark"):
            picture(browser, address, scheme, ROOT / "docs" / f"playground-{scheme}.png")


if __name__ == "__main__":
    main()
