"""The playground's web application: one page, and the few routes that it needs."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from lora_drop_vllm.opinions import score
from lora_drop_vllm.playground.answers import Answer, Question, Sampling, stream
from lora_drop_vllm.playground.errors import FAILURES, in_plain_words
from lora_drop_vllm.playground.origins import OwnPagesOnly
from lora_drop_vllm.playground.served import Served
from lora_drop_vllm.playground.snippets import as_curl, as_python
from lora_drop_vllm.server_process import Endpoint

PAGE = Path(str(files("lora_drop_vllm.playground"))) / "page"
MOST_CHARACTERS = 1_000_000  # of a conversation; the server's own limit comes long before


class Turn(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MOST_CHARACTERS)


class Ask(BaseModel):
    """What the page sends for an answer; what the server refuses, the server explains."""

    messages: list[Turn] = Field(min_length=1, max_length=1000)
    k: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    plain: bool = False

    def question(self) -> Question:
        """The same, as the server is asked."""
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens, self.seed)
        messages = [turn.model_dump() for turn in self.messages]
        return Question(messages, self.k, sampling, self.plain)


class Written(BaseModel):
    """An answer to score: tokens of its prompt and of itself."""

    prompt_ids: list[int] = Field(min_length=1)
    ids: list[int] = Field(min_length=1)


def create_app(endpoint: Endpoint, served: Served, hosts: frozenset[str] | None) -> FastAPI:
    """The application in front of one server.

    Args:
        hosts: names under which browsers may reach it; None for any
    """
    app = FastAPI(title="LoRA-Drop playground", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(OwnPagesOnly, hosts=hosts)
    client = endpoint.async_client()

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/api/served")
    async def what_is_served() -> dict[str, Any]:
        return asdict(served)

    @app.post("/api/answer")
    async def answer(ask: Ask) -> StreamingResponse:
        events = _events(endpoint, client, served, ask.question())
        return StreamingResponse(events, media_type="application/x-ndjson")

    @app.post("/api/score")
    async def opinions(written: Written) -> Response:
        try:
            scores = await score(
                client, served.name, written.prompt_ids, written.ids, served.max_len
            )
        except FAILURES as error:
            return JSONResponse({"error": in_plain_words(error, served.url)}, 502)
        return JSONResponse(asdict(scores))

    @app.post("/api/code")
    async def code(ask: Ask) -> dict[str, str]:
        question, with_key = ask.question(), "OPENAI_API_KEY" in os.environ
        return {
            "curl": as_curl(question, served.url, served.name, with_key),
            "python": as_python(question, served.url, served.name),
        }

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


async def _events(
    endpoint: Endpoint, client: Any, served: Served, question: Question
) -> AsyncIterator[str]:
    """Lines of JSON: a piece of the answer each, at last what the server counted meanwhile.

    When the browser hangs up, the request to the server is closed, which aborts it.
    """
    answer = Answer(served.kv_skips)
    try:
        before = await asyncio.to_thread(endpoint.metrics)
        async for piece in stream(client, served.name, question, answer):
            event: dict[str, Any] = asdict(piece) | {"summary": asdict(answer.summary())}
            if len(answer.pieces) == 1:
                event["prompt_ids"] = answer.prompt_ids
            yield _line(event)
        after = await asyncio.to_thread(endpoint.metrics)
        counted = {name: after[f"{name}_steps"] for name in ("full", "lora")}
        since = {name: counted[name] - before[f"{name}_steps"] for name in counted}
        yield _line({"counted": since, "since_start": counted})
    except FAILURES as error:
        yield _line({"error": in_plain_words(error, served.url)})


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"
