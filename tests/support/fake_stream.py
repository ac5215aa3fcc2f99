"""A fake server that streams: the part of the API that the playground uses, without a model."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from fake_server import FakeServer, Handler

K = 3
MAX_LEN = 512
# like vLLM's: probabilities of the best five, and of any other token in a prompt
TOP = (0.6, 0.2, 0.1, 0.05, 0.02)
OTHER = 0.001


def kinds_of(k: int, tokens: int) -> str:
    """The letters of the steps of a lone answer."""
    return "".join("L" if n % (k + 1) else "F" for n in range(tokens))


class StreamingFake(FakeServer):
    """Sends the same tokens to every client, one per chunk; ids are places in `words`.

    Attributes:
        words: the vocabulary; the first five are always the base model's best, in this order
        tokens: ids of the answer's tokens
        together: tokens of each chunk, if not one each
        pause: seconds before each chunk
        refusal: the message of a 400, if not empty
        cut_after: chunks after which the connection breaks
        gone: every connection breaks at once
        tells: true if the server tells the kinds of its steps
        headers: headers of each request, in order, names in lower case
        hung_up: set after a client left during an answer
        info: labels of the gauge that names the served model; None leaves the gauge out
    """

    def __init__(self, words: list[str], tokens: list[int]) -> None:
        super().__init__(lambda prompt, base: "")
        self.RequestHandlerClass = StreamingHandler
        self.reset(words, tokens)

    def reset(self, words: list[str], tokens: list[int]) -> None:
        """Resets everything but the counters."""
        self.words, self.tokens = words[:], tokens[:]
        self.together: list[tuple[int, ...]] = []
        self.pause = 0.0
        self.refusal = ""
        self.cut_after: int | None = None
        self.gone = False
        self.tells = True
        self.asked.clear()
        self.headers: list[dict[str, str]] = []
        self.hung_up = threading.Event()
        self.info: dict[str, str] | None = {
            "model_name": "fake",
            "adapter": "rho25",
            "drop_layers": "10,11,12",
            "attention_only": "12",
            "num_layers": "30",
            "k": str(K),
            "reuse": "update",
            "kv": "skip",
            "least_k": "0",
        }

    def answer(self, body: dict[str, Any], send: Callable[[Any], None]) -> None:
        """Streams the answer and counts its steps."""
        chat = "messages" in body
        kinds = kinds_of(body["vllm_xargs"]["lora_drop_k"], len(self.tokens))
        if chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            send(self.chunk(role) | {"prompt_token_ids": [0, 1, 2]})
        chunks = self.together or [(token,) for token in self.tokens]
        sent = 0
        for n, tokens in enumerate(chunks):
            time.sleep(self.pause)
            text = "".join(self.words[token] for token in tokens)
            choice: dict[str, Any] = {"index": 0, "token_ids": tokens, "finish_reason": None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if self.tells:
                choice["lora_drop_steps"] = kinds[sent : sent + len(tokens)]
            sent += len(tokens)
            if n == 0 and not chat:
                choice["prompt_token_ids"] = [0, 1, 2]
            if n == len(chunks) - 1:
                choice["finish_reason"] = "length"
            if n == self.cut_after:
                raise ConnectionAbortedError
            send(self.chunk(choice))
        with self.lock:
            self.steps["full_steps"] += kinds.count("F")
            self.steps["lora_steps"] += kinds.count("L")

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"id": "0", "object": "chunk", "created": 0, "model": "fake", "choices": [choice]}

    def scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of a prompt: those of the best five and of its own token."""
        entries: list[Any] = [None]
        for token in body["prompt"][1:]:
            ids = [*range(len(TOP)), *([token] if token >= len(TOP) else [])]
            entries.append(
                {
                    str(i): {
                        "logprob": math.log(TOP[i] if i < len(TOP) else OTHER),
                        "rank": i + 1,
                        "decoded_token": self.words[i],
                    }
                    for i in ids
                }
            )
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": entries}
        return self.chunk(choice)


class StreamingHandler(Handler):
    server: StreamingFake

    def do_GET(self) -> None:  # noqa: N802
        if self.path == "/v1/models":
            model = {"id": "fake", "object": "model", "created": 0, "owned_by": "us"}
            return self.reply(200, {"data": [model | {"max_model_len": MAX_LEN}], "object": "list"})
        super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append({n.lower(): v for n, v in self.headers.items()})
        if self.server.gone:
            return self.connection.close()
        if self.server.refusal:
            return self.reply(400, {"error": {"message": self.server.refusal, "code": 400}})
        if "prompt_logprobs" in body:
            return self.reply(200, self.server.scored(body))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.server.answer(body, lambda chunk: self.event(json.dumps(chunk)))
            self.event("[DONE]")
        except ConnectionAbortedError:
            self.connection.close()
        except OSError:
            self.server.hung_up.set()

    def event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def reply(self, status: int, answer: Any) -> None:
        if self.path == "/metrics" and self.server.info is not None:
            labels = ",".join(f'{name}="{value}"' for name, value in self.server.info.items())
            answer += f"vllm:lora_drop_info{{{labels}}} 1.0\n"
        super().reply(status, answer)
