"""Health check of the images: `/health`, and one completion after each start of the server.

Every completion brings a prompt, which is a full step for everybody, so later checks ask for none.
A key that the server asks for is read from VLLM_API_KEY; a server with another key is asked for no
completion.
"""

import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

SERVER = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
ANSWERED = Path(tempfile.gettempdir()) / "lora_drop_answered"  # which start of the server has


def ask(path: str, body: dict[str, object] | None = None) -> bytes:
    """The server's answer; an error where it is not 200."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{SERVER}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=15) as answer:
        return answer.read()


def complete() -> None:
    """One token from the model; nothing where the server does not take our key."""
    try:
        model = json.loads(ask("/v1/models"))["data"][0]["id"]
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return
        raise
    answer = ask("/v1/completions", {"model": model, "prompt": "1", "max_tokens": 1})
    assert json.loads(answer)["usage"]["completion_tokens"] == 1


ask("/health")
# the start time of the container's first process, in ticks since the machine's
start = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
if not ANSWERED.exists() or ANSWERED.read_text() != start:
    complete()
    ANSWERED.write_text(start)
