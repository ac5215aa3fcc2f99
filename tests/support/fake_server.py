"""A small OpenAI-compatible server without a model, with LoRA-Drop's counters at `/metrics`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """Speaks the part of the API that callers use; counts steps like a server with k = 3.

    Attributes:
        say: gives the answer to a prompt, given k == 0; a ValueError means a bad request
        lora_steps: gives the LoRA steps of an answer, given k == 0 and its number of tokens
        asked: the bodies of all requests, in order
        overlapped: true if a request with k = 0 ran beside another
    """

    def __init__(self, say: Callable[[str, bool], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.say = say
        self.asked: list[dict[str, Any]] = []
        self.running: list[bool] = []
        self.overlapped = False
        self.lock = threading.Lock()
        self.steps = {"full_steps": 7, "lora_steps": 11}
        self.lora_steps: Callable[[bool, int], int] = lambda base, tokens: (
            0 if base else 3 * tokens // 4
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        base = body.get("vllm_xargs") == {"lora_drop_k": 0}
        with self.lock:
            self.asked.append(body)
            self.running.append(base)
            self.overlapped |= len(set(self.running)) > 1
        try:
            return self.answer(body, base)
        finally:
            with self.lock:
                self.running.remove(base)

    def answer(self, body: dict[str, Any], base: bool) -> dict[str, Any]:
        if len(body["stop"]) > 4:
            raise ValueError("stop: at most 4 strings")
        text = self.say(body["prompt"], base)
        for stop in body["stop"]:
            text = text.split(stop)[0]
        tokens = len(text.split()) + 1
        self.count(base, tokens)
        reason = "length" if tokens > body["max_tokens"] else "stop"
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
        return self.head("text_completion", choice) | {"usage": usage}

    def count(self, base: bool, tokens: int) -> None:
        """Adds the steps of an answer to the counters."""
        lora = self.lora_steps(base, tokens)
        with self.lock:
            self.steps["lora_steps"] += lora
            self.steps["full_steps"] += tokens - lora

    def head(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        """A response with one choice."""
        return {"id": "0", "object": kind, "created": 0, "model": "fake", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/metrics":
            lines = [  # two engines
                f'vllm:lora_drop_{name}_total{{engine="{n}",model_name="fake"}} {float(part)}\n'
                for name, value in self.server.steps.items()
                for n, part in enumerate((value // 2, value - value // 2))
            ]
            return self.reply(200, "".join(lines))
        return self.reply(200, {"object": "list", "data": [self.models()]})

    def models(self) -> dict[str, Any]:
        return {"id": "fake", "object": "model", "created": 0, "owned_by": "us"}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self.reply(200, self.server.complete(body))
        except ValueError as error:
            self.reply(400, {"error": {"message": str(error), "code": 400}})

    def reply(self, status: int, answer: Any) -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        kind = "text/plain" if isinstance(answer, str) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
