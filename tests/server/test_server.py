"""`vllm serve --model-impl lora_drop` over HTTP: endpoints, metrics, bad requests, stopping."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_drop_vllm.cli import demo, main
from lora_drop_vllm.server_process import Server

pytestmark = [pytest.mark.engine, pytest.mark.model]


@pytest.fixture(scope="module")
def server(real_model: Path) -> Iterator[Server]:
    settings = {"lora_drop": {"untrained": True, "rho": 0.25, "k": 3}}
    arguments = ["--model-impl", "lora_drop", "--additional-config", json.dumps(settings)]
    with Server(real_model, arguments) as running:
        yield running


def request(server: Server, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        server.url + path, data, {"Content-Type": "application/json"} if data else {}
    )
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except json.JSONDecodeError:
        return status, text


def complete(server: Server, **body: Any) -> tuple[int, Any]:
    given = {"model": server.name, "prompt": "The sky is", "max_tokens": 9, "temperature": 0}
    return request(server, "/v1/completions", given | {"ignore_eos": True} | body)


def test_every_endpoint_answers(server: Server) -> None:
    assert request(server, "/health")[0] == 200
    assert request(server, "/v1/models")[1]["data"][0]["id"] == server.name
    assert complete(server)[1]["usage"]["completion_tokens"] == 9
    message = {"role": "user", "content": "Hello"}
    chat = {"model": server.name, "messages": [message], "max_tokens": 5}
    assert request(server, "/v1/chat/completions", chat)[0] == 200
    assert "vllm:num_requests_running" in request(server, "/metrics")[1]


def test_counters_tell_what_a_request_did(server: Server) -> None:
    before = server.metrics()
    complete(server, prompt=[5] * 20, max_tokens=9)
    used = {name: value - before[name] for name, value in server.metrics().items()}
    assert used == {
        "full_steps": 3,  # the prompt and two refreshes
        "lora_steps": 6,
        "prompt_steps": 1,
        "kv_slots_written": 22,
        "kv_slots_skipped": 6,
        "kv_blocks": 0,
    }


def test_streaming_gives_one_token_at_a_time(server: Server) -> None:
    answer = server.client().completions.create(
        model=server.name, prompt="Once", max_tokens=12, stream=True, extra_body={"ignore_eos": 1}
    )
    assert sum(1 for chunk in answer if chunk.choices) >= 10


@pytest.mark.parametrize("k", ["x", -1, 1000, 1.5, "1"])
def test_a_bad_k_is_a_400_and_the_server_lives_on(server: Server, k: Any) -> None:
    status, answer = complete(server, vllm_xargs={"lora_drop_k": k})
    assert status == 400
    assert "lora_drop_k" in answer["error"]["message"] and "0" in answer["error"]["message"]
    assert complete(server)[0] == 200


@pytest.mark.parametrize(("k", "full"), [(0, 9), (1, 5), (3, 3)])
def test_a_request_may_lower_its_k(server: Server, k: int, full: int) -> None:
    before = server.metrics()["full_steps"]
    assert complete(server, vllm_xargs={"lora_drop_k": k})[0] == 200
    assert server.metrics()["full_steps"] - before == full


def test_evaluate_decodes_with_both(server: Server, tmp_path: Path) -> None:
    line = {"question": "What is 2 and 2?", "answer": "Add them.\n#### 4"}
    (tmp_path / "sums.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    command = ["evaluate", "--url", server.url, "--tasks", str(tmp_path / "sums.jsonl")]
    command += ["--num-fewshot", "1", "--max-tokens", "9", "--json", str(tmp_path / "out.json")]
    assert main(command) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["decoded"]
    assert result["base"]["lora_steps"] == 0 and result["base"]["full_steps"] > 1
    assert result["lora_drop"]["lora_steps"] >= result["lora_drop"]["full_steps"]


def test_evaluate_compares_rollouts(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["evaluate", "--url", server.url, "--rollouts", "--limit", "2", "--json", str(out)]
    assert main([*command, "--max-tokens", "13", "--concurrency", "1"]) == 0
    found = json.loads(out.read_text())["rollouts"]
    assert found["examples"] == 2 and found["base"]["lora_steps"] == 0
    assert found["lora_drop"]["lora_steps"] == 18 and found["lora_drop"]["full_steps"] == 8
    for answer in found["answers"]:
        chat = {"model": server.name, "messages": answer["messages"], "max_tokens": 13}
        chat |= {"temperature": 0, "vllm_xargs": {"lora_drop_k": 0}}
        told = request(server, "/v1/chat/completions", chat)[1]
        assert answer["base"]["text"] == told["choices"][0]["message"]["content"]
        assert answer["base"]["tokens"] == answer["lora_drop"]["tokens"] == 13
        assert answer["base"]["cut_off"] and answer["base"]["first_choice"] == 1
        assert answer["lora_drop"]["first_choice"] < 1  # nothing was trained
        assert answer["lora_drop"]["logprob"] < answer["base"]["logprob"] < 0


def test_the_demo_judges_the_answer_it_gave(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = server.metrics()
    told = demo.tell(server, 13)
    assert "".join(told.pieces) in capsys.readouterr().out
    assert len(told.ids) == 13 and len(told.prompt_ids) > 13
    assert server.metrics()["lora_steps"] - before["lora_steps"] == 9
    body = {"prompt": told.prompt_ids + told.ids, "max_tokens": 1, "prompt_logprobs": 1}
    entries = complete(server, **body)[1]["choices"][0]["prompt_logprobs"][-13:]
    same = sum(entry[str(i)]["rank"] == 1 for i, entry in zip(told.ids, entries))
    scores = demo.judge(server, told)
    assert 0 < same < 13 and f"{same} of the 13 tokens" in demo.in_words(scores)


def test_a_disconnected_client_leaves_nothing_behind(server: Server) -> None:
    import time

    answer = server.client().completions.create(
        model=server.name, prompt="Once", max_tokens=400, stream=True, extra_body={"ignore_eos": 1}
    )
    for _ in range(3):
        next(iter(answer))
    answer.close()
    deadline = time.monotonic() + 30
    while server.metrics()["kv_blocks"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metrics()["kv_blocks"] == 0
    assert complete(server)[0] == 200
