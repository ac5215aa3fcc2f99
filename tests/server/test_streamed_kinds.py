"""The kinds of steps in answers over HTTP: streamed chat and text, several servers and engines."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from environment import V2
from tiny import make_adapter, prompt_of

from lora_drop_vllm.server_process import Server

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the interpreter needs a stand-in backend in every process"),
]

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASK = {"vllm_xargs": {"lora_drop_steps": 1}}


@contextmanager
def serving(model: Path, folder: Path, *arguments: str) -> Iterator[Server]:
    make_adapter(folder, model, drop_layers=[3, 4, 6])
    settings = json.dumps({"lora_drop": {"adapter": str(folder)}})
    given = ["--model-impl", "lora_drop", "--additional-config", settings]
    given += ["--dtype", "float32", "--chat-template", TEMPLATE, *arguments]
    with Server(model, given) as server:
        yield server


@pytest.fixture(scope="module")
def server(smooth_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(smooth_model, tmp_path_factory.mktemp("kinds") / "adapter") as running:
        yield running


def post(server: Server, route: str, **body: Any) -> Any:
    given = {"model": server.name, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    if route == "chat/completions":
        given["messages"] = [{"role": "user", "content": "Once"}]
    else:
        given["prompt"] = prompt_of(20)
    return urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/v1/{route}",
            json.dumps(given | body).encode(),
            {"Content-Type": "application/json"},
        ),
        timeout=120,
    )


def streamed(server: Server, route: str, **body: Any) -> list[Any]:
    """Choices of the chunks with token ids, of a request that asks for its steps."""
    with post(server, route, stream=True, **(ASK | body)) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return [choice for choice in choices if choice.get("token_ids")]


def told(choices: list[Any]) -> str:
    assert all(len(c["lora_drop_steps"]) == len(c["token_ids"]) for c in choices)
    return "".join(choice["lora_drop_steps"] for choice in choices)


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("k", "kinds"), [(3, "FLLLFLLLF"), (1, "FLFLFLFLF"), (0, "F" * 9)], ids=["k3", "k1", "k0"]
)
def test_a_lone_answer_is_told_its_cycle(server: Server, route: str, k: int, kinds: str) -> None:
    before = server.metrics()
    asked = {"vllm_xargs": {"lora_drop_steps": 1, "lora_drop_k": k}}
    assert told(streamed(server, route, **asked)) == kinds
    used = {name: value - before[name] for name, value in server.metrics().items()}
    assert [used["full_steps"], used["lora_steps"]] == [kinds.count("F"), kinds.count("L")]


def test_every_prompt_of_a_request_is_told_its_own(server: Server) -> None:
    choices = streamed(server, "completions", prompt=[prompt_of(5), prompt_of(9)], echo=True)
    for n in (0, 1):
        mine = told([choice for choice in choices if choice["index"] == n])
        assert len(mine) == 9 and mine[0] == "F" and "L" in mine


def test_a_stream_in_intervals_loses_nothing(server: Server) -> None:
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(streamed, server, "completions", max_tokens=64, stream_interval=5)
        fast = threads.submit(streamed, server, "completions", max_tokens=40)
    assert max(len(choice["token_ids"]) for choice in slow.result()) >= 5
    assert len(told(slow.result())) == 64 and len(told(fast.result())) == 40
    assert "LLLL" not in told(slow.result())


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_an_answer_in_one_piece_has_them_too(server: Server, route: str) -> None:
    with post(server, route, **ASK) as answer:
        assert json.load(answer)["kv_transfer_params"] == {"lora_drop_steps": "FLLLFLLLF"}


@pytest.mark.parametrize("stream", [True, False])
def test_who_does_not_ask_is_not_told(server: Server, stream: bool) -> None:
    with post(server, "completions", stream=stream) as answer:
        assert "lora_drop" not in answer.read().decode()


def test_what_cannot_be_told_is_a_400(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, "completions", n=2, temperature=1, **ASK)
    assert refused.value.code == 400
    assert "lora_drop_steps=1: cannot be combined with n=2" in refused.value.read().decode()


def test_a_disconnected_client_leaves_nothing_behind(server: Server) -> None:
    answer = post(server, "completions", stream=True, max_tokens=1500, **ASK)
    assert answer.read(200)
    answer.close()
    deadline = time.monotonic() + 30
    while server.metrics()["kv_blocks"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metrics()["kv_blocks"] == 0
    assert told(streamed(server, "completions")) == "FLLLFLLLF"


@pytest.mark.matrix
def test_two_servers_before_two_engines(
    smooth_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    counts = range(20, 36)
    many = ("--data-parallel-size", "2", "--api-server-count", "2")
    with serving(smooth_model, tmp_path / "adapter", *many) as server:
        with ThreadPoolExecutor(8) as threads:
            answers = threads.map(
                lambda n: streamed(server, "completions", max_tokens=n, prompt=prompt_of(n)), counts
            )
            for count, choices in zip(counts, answers, strict=True):
                kinds = told(choices)
                assert len(kinds) == count and kinds[0] == "F" and "LLLL" not in kinds
        assert told(streamed(server, "chat/completions")) == "FLLLFLLLF"
