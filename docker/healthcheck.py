"""Health check of the images: one completion from the server, not just an open port."""

import json
import urllib.request

SERVER = "http://127.0.0.1:8000"

with urllib.request.urlopen(f"{SERVER}/v1/models", timeout=5) as answer:
    model = json.load(answer)["data"][0]["id"]
body = json.dumps({"model": model, "prompt": "1", "max_tokens": 1}).encode()
request = urllib.request.Request(
    f"{SERVER}/v1/completions", body, {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request, timeout=15) as answer:
    assert json.load(answer)["usage"]["completion_tokens"] == 1
