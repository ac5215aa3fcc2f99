"""The images' health check against a server that counts what it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker/healthcheck.py"


class Counted(ThreadingHTTPServer):
    asked: Counter[str]
    key: str | None = None
    healthy = True


class Handler(BaseHTTPRequestHandler):
    server: Counted

    def _answer(self) -> None:
        self.server.asked[self.path] += 1
        wanted = None if self.server.key is None else f"Bearer {self.server.key}"
        status = 200 if self.server.healthy else 503
        if self.path != "/health" and wanted not in (None, self.headers["Authorization"]):
            status = 401
        body = json.dumps({"data": [{"id": "m"}], "usage": {"completion_tokens": 1}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Counted]:
    with Counted(("127.0.0.1", 0), Handler) as one:
        one.asked = Counter()
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def passes(server: Counted, scratch: Path, key: str = "") -> bool:
    """True if the check calls this server healthy."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"http://127.0.0.1:{server.server_port}"],
        env=os.environ | {"TMPDIR": str(scratch), "VLLM_API_KEY": key},
        capture_output=True,
    )
    return done.returncode == 0


def test_one_completion_and_then_only_health(server: Counted, tmp_path: Path) -> None:
    assert all(passes(server, tmp_path) for _ in range(3))
    assert server.asked == {"/health": 3, "/v1/models": 1, "/v1/completions": 1}


@pytest.mark.parametrize(("key", "completions"), [("", 0), ("secret", 1)])
def test_a_server_with_a_key(server: Counted, tmp_path: Path, key: str, completions: int) -> None:
    server.key = "secret"
    assert passes(server, tmp_path, key)
    assert server.asked["/v1/completions"] == completions


def test_a_dead_engine_fails(server: Counted, tmp_path: Path) -> None:
    assert passes(server, tmp_path)
    server.healthy = False
    assert not passes(server, tmp_path)
