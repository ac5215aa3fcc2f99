"""A streaming client that stamps every token, and a reader of a server's `/metrics`."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_SECONDS = 3600
SETTLE_SECONDS = 10


class RunFailedError(RuntimeError):
    """Error of a run that did not do what was to be measured; it gives no figure."""


@dataclass(frozen=True)
class Answer:
    """One streamed completion.

    Attributes:
        sent: when the request was sent, in seconds of `time.perf_counter`
        stamps: arrival of each token; tokens of one chunk share their stamp
        tokens: ids of the tokens
        chunks: number of chunks that brought tokens
    """

    sent: float
    stamps: tuple[float, ...]
    tokens: tuple[int, ...]
    chunks: int

    @property
    def first_token_ms(self) -> float:
        """Time to first token, milliseconds."""
        return 1000 * (self.stamps[0] - self.sent)


def burst(
    url: str, bodies: list[dict[str, Any]], watch: Callable[[], None] | None = None
) -> list[Answer]:
    """Sends all requests at once and streams their answers.

    Args:
        url: URL of the server, without `/v1`
        bodies: requests for `/v1/completions`; this function adds streaming and token ids
        watch: called repeatedly, in a thread, until the last answer has ended

    Raises:
        RunFailedError: the server refused a request, or an answer is shorter than `max_tokens`.
    """
    return asyncio.run(_burst(url, bodies, watch))


async def _burst(
    url: str, bodies: list[dict[str, Any]], watch: Callable[[], None] | None
) -> list[Answer]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        read_bufsize=1 << 22,  # the first chunk carries the prompt's ids, all on one line
    ) as session:
        answers = asyncio.gather(*(_stream(session, url, body) for body in bodies))
        while watch is not None and not answers.done():
            await asyncio.to_thread(watch)
        return await answers


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    asked = body | {"stream": True, "return_token_ids": True}
    lines: list[tuple[float, bytes]] = []
    sent = perf_counter()
    async with session.post(f"{url}/v1/completions", json=asked) as answer:
        if answer.status != 200:
            raise RunFailedError(f"{url}: status {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:  # parsing waits until all answers are stamped
            lines.append((perf_counter(), line))
    return _parse(sent, lines, body["max_tokens"])


def _parse(sent: float, lines: list[tuple[float, bytes]], wanted: int) -> Answer:
    stamps: list[float] = []
    tokens: list[int] = []
    chunks = 0
    for stamp, line in lines:
        data = line.removeprefix(b"data: ").strip()
        if data == line.strip() or data == b"[DONE]":
            continue
        message = json.loads(data)
        if "error" in message:
            raise RunFailedError(f"the server broke off: {message['error']}")
        for choice in message["choices"]:
            ids = choice.get("token_ids")
            if ids is None:
                raise RunFailedError("no token_ids in the stream: not a vLLM that can be measured")
            stamps += [stamp] * len(ids)
            tokens += ids
            chunks += bool(ids)
    if len(tokens) != wanted:
        raise RunFailedError(f"{len(tokens)} tokens came instead of {wanted}")
    return Answer(sent, tuple(stamps), tuple(tokens), chunks)


@dataclass(frozen=True)
class Metrics:
    """A server's `/metrics`: values by name, labels added up, and the labels of its cache."""

    values: dict[str, float]
    cache: dict[str, str]

    def __getitem__(self, name: str) -> float:
        """Value of `vllm:<name>`.

        Raises:
            RunFailedError: the server has no such metric.
        """
        if f"vllm:{name}" not in self.values:
            raise RunFailedError(f"/metrics has no vllm:{name}: is this the right server?")
        return self.values[f"vllm:{name}"]


def read_metrics(url: str) -> Metrics:
    """Current values of `/metrics`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    cache: dict[str, str] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
            if sample.name == "vllm:cache_config_info":
                cache = dict(sample.labels)
    return Metrics(values, cache)


def settled_metrics(url: str) -> Metrics:
    """Values of `/metrics` once no request runs and the counters stand still.

    Raises:
        RunFailedError: they do not, so somebody else uses the server.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    last = read_metrics(url)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        found = read_metrics(url)
        ours = {n: v for n, v in found.values.items() if n.startswith("vllm:lora_drop_")}
        if not found["num_requests_running"] and ours.items() <= last.values.items():
            return found
        last = found
    raise RunFailedError(f"{url}: requests of others are running; measure on a server of your own")
