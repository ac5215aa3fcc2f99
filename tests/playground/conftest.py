"""Fakes for the playground, and the reason why tests of its page are skipped."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from browser import MISSING
from fake_stream import StreamingFake

WORDS = [" the", " a", " of", " and", " to", " sky", " is", " <b>blue</b>", "é", "'\"$x`"]
TOKENS = [0, 5, 6, 7, 3, 0, 8, 9, 1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("browser") and MISSING:
            why = f"{MISSING} not installed: make test-browser installs what is missing"
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="module")
def one_fake() -> Iterator[StreamingFake]:
    server = StreamingFake(WORDS, TOKENS)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake(one_fake: StreamingFake) -> StreamingFake:
    """A server that streams `TOKENS` of `WORDS`."""
    one_fake.reset(WORDS, TOKENS)
    return one_fake
