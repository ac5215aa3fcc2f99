"""A server and what goes wrong around it: after each case all blocks are back and tokens right.

One process with a pool of 8 KV blocks, which four requests of a prompt each fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from environment import V2
from oracle import Oracle
from serving import settings_of
from tiny import VOCAB, load_model, make_adapter, prompt_of

from lora_drop_vllm.server_process import Server

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the interpreter needs a stand-in backend in every process"),
]

LENGTH, TOKENS = 192, 14
PROMPT = prompt_of(20)
POOL = ["--max-model-len", str(LENGTH), "--num-gpu-blocks-override", "9"]
BASE = {"vllm_xargs": {"lora_drop_k": 0}}


@pytest.fixture(scope="module")
def given(smooth_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The adapter's folder, the model for the oracle, and its settings."""
    folder = tmp_path_factory.mktemp("served") / "adapter"
    config, tensors = make_adapter(folder, smooth_model, drop_layers=[3, 4, 6])
    model, settings = load_model(smooth_model), settings_of(config, tensors)
    right = Oracle(model, settings).decode(PROMPT, TOKENS)
    return {"folder": folder, "model": model, "settings": settings, "right": right}


@pytest.fixture(scope="module")
def started(smooth_model: Path, given: dict[str, Any]) -> Iterator[Server]:
    settings = json.dumps({"lora_drop": {"adapter": str(given["folder"])}})
    arguments = ["--model-impl", "lora_drop", "--additional-config", settings]
    with Server(smooth_model, [*arguments, "--dtype", "float32", *POOL]) as running:
        yield running


@pytest.fixture
def server(started: Server, given: dict[str, Any]) -> Iterator[Server]:
    """The module's server, which has to be as good as new after the test."""
    yield started
    if process_of(started).poll() is None:
        assert_as_new(started, given)


def process_of(server: Server) -> subprocess.Popen[bytes]:
    assert server.process is not None
    return server.process


def assert_as_new(server: Server, given: dict[str, Any]) -> None:
    deadline = time.monotonic() + 60
    while (held := blocks_held(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not held
    assert asyncio.run(complete(server)) == given["right"]


def blocks_held(server: Server) -> dict[str, float]:
    """What is not 0 of the gauges that are 0 in an idle server."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {n: v for n in (*names, "lora_drop_kv_blocks") if (v := metric(server, n))}


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


def body_of(server: Server, tokens: int = TOKENS, **given: Any) -> bytes:
    body = {"model": server.name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    return json.dumps(body | {"ignore_eos": True, "return_token_ids": True} | given).encode()


async def send(server: Server, body: bytes, path: str = "/v1/completions") -> Any:
    """A request on a connection of its own: the streams to read from and write to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 24)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def begun(server: Server) -> Any:
    """A request of 150 tokens of which the first has come."""
    streams = await send(server, body_of(server, 150, stream=True))
    await streams[0].readuntil(b"token_ids")
    return streams


async def answer_of(streams: Any) -> tuple[int, str]:
    """Status and body of the answer, with the marks of its chunks where it is a stream."""
    reader, writer = streams
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


async def complete(server: Server, **given: Any) -> list[int]:
    status, body = await answer_of(await send(server, body_of(server, **given)))
    assert status == 200, body
    tokens: list[int] = json.loads(body)["choices"][0]["token_ids"]
    return tokens


def tokens_of_stream(body: str) -> list[int]:
    lines = [line for line in body.splitlines() if line.startswith('data: {"id"')]
    choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
    return [token for choice in choices for token in choice["token_ids"] or []]


@pytest.mark.parametrize("streams", [40, pytest.param(400, marks=pytest.mark.matrix)])
def test_streams_that_are_dropped_at_once(server: Server, streams: int) -> None:
    """Some in mid-answer, some before it began, and one request in their midst goes on."""

    async def storm() -> list[int]:
        body = body_of(server, 150, stream=True)
        opened = await asyncio.gather(*(send(server, body) for _ in range(streams)))
        await opened[0][0].readuntil(b"token_ids")
        kept = asyncio.create_task(complete(server, **BASE))
        for _, writer in opened:
            writer.transport.abort()
        return await kept

    assert len(asyncio.run(storm())) == TOKENS


def test_a_pool_that_is_too_small_for_all(server: Server, given: dict[str, Any]) -> None:
    """Requests that are preempted and computed again; with k = 0 their tokens are known."""

    async def crowd() -> list[list[int]]:
        return await asyncio.gather(
            *(complete(server, prompt=prompt, tokens=30, **BASE) for prompt in prompts)
        )

    before = metric(server, "num_preemptions_total")
    prompts = [prompt_of(60, seed) for seed in range(5)]  # a block of 64 tokens each, then two
    answers = asyncio.run(crowd())
    assert metric(server, "num_preemptions_total") > before, "nothing was tested"
    for prompt, answer in zip(prompts, answers):
        base = Oracle(given["model"], replace(given["settings"], k=0))
        assert answer == base.decode(prompt, 30)


@pytest.mark.parametrize("connections", [100, pytest.param(1000, marks=pytest.mark.matrix)])
def test_many_connections_at_once(server: Server, connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))

    async def crowd() -> list[list[int]]:
        asked = [await send(server, body_of(server, 4, **BASE)) for _ in range(connections)]
        answers = await asyncio.gather(*map(answer_of, asked))
        assert {status for status, _ in answers} == {200}
        return [json.loads(body)["choices"][0]["token_ids"] for _, body in answers]

    try:
        answers = asyncio.run(crowd())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(answers) == connections
    assert all(answer == answers[0] for answer in answers)


def test_a_slow_reader_holds_nobody_up(server: Server, given: dict[str, Any]) -> None:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", server.port))
    body = body_of(server, 150, stream=True, logprobs=5)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    assert_as_new(server, given)  # it is computed, and others are served, with nothing read
    with slow, slow.makefile() as answer:
        assert len(tokens_of_stream(answer.read())) == 150


def nested(depth: int) -> bytes:
    return b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        nested(100_000),
        {"model": "another"},
        {"prompt": None},
        {"prompt": {"text": "x"}},
        {"prompt": [VOCAB]},
        {"prompt": [-1]},
        {"prompt": [0.5]},
        {"prompt": [5] * LENGTH},
        {"prompt": "x" * 1_000_000},
        {"max_tokens": -1},
        {"max_tokens": "many"},
        {"temperature": "hot"},
        {"temperature": -1},
        {"logprobs": 10**6},
        {"n": 0},
        {"vllm_xargs": "k"},
        {"vllm_xargs": {"lora_drop_k": 4}},
        {"vllm_xargs": {"lora_drop_k": [0]}},
    ],
    ids=lambda body: str(body)[:30],
)
def test_bad_requests_are_refused(started: Server, body: Any) -> None:
    sent = body if isinstance(body, bytes) else body_of(started, **body)
    assert 400 <= asyncio.run(status_of(started, sent)) < 500


async def status_of(server: Server, body: bytes) -> int:
    return (await answer_of(await send(server, body)))[0]


def test_after_bad_requests_the_server_is_as_new(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}/v1/nothing", timeout=30)


def test_the_adapters_files_may_change_while_it_is_served(
    server: Server, given: dict[str, Any]
) -> None:
    """Weights are read at the start; the files count again at the next."""
    aside = given["folder"].with_name("aside")
    given["folder"].rename(aside)
    try:
        assert_as_new(server, given)
        given["folder"].mkdir()
        for file in aside.iterdir():
            (given["folder"] / file.name).write_bytes(b"something else")
        assert_as_new(server, given)
        for file in given["folder"].iterdir():
            file.unlink()
        given["folder"].rmdir()
    finally:
        aside.rename(given["folder"])


def test_a_killed_engine_ends_the_server_and_a_restart_serves(
    server: Server, given: dict[str, Any]
) -> None:
    async def kill() -> str:
        reader, _ = await begun(server)
        os.kill(engine_core(server), signal.SIGKILL)
        return (await reader.read()).decode()

    assert '"error"' in asyncio.run(kill())
    assert process_of(server).wait(60) != 0
    assert "EngineDeadError" in server.log.read_text()
    server.start()


def test_a_server_that_is_told_to_stop_stops(server: Server) -> None:
    """Its stream ends with an error, or when its client hangs up, which is vLLM's own doing."""

    async def stop() -> None:
        reader, writer = await begun(server)
        process_of(server).send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), 5)
        writer.close()

    asyncio.run(stop())
    assert process_of(server).wait(60) == 0


def engine_core(server: Server) -> int:
    """The process id of the server's only engine."""
    pid = process_of(server).pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (found,) = [c for c in children if "EngineCore" in Path(f"/proc/{c}/cmdline").read_text()]
    return int(found)
