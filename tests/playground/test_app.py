"""The playground's routes in front of a fake server."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from fake_stream import MAX_LEN, OTHER, TOP, StreamingFake, kinds_of
from fastapi.testclient import TestClient

from lora_drop_vllm.playground.app import PAGE, create_app
from lora_drop_vllm.playground.launch import LOOPBACK
from lora_drop_vllm.playground.served import look
from lora_drop_vllm.server_process import Endpoint

ASK = {
    "messages": [{"role": "user", "content": "Say 'é' and \"$HOME\"\n`id`"}],
    "k": 3,
    "temperature": 0,
    "top_p": 1,
    "max_tokens": 9,
    "seed": 0,
}
KEY = "sk-not-for-anybody-else"


@pytest.fixture
def page(fake: StreamingFake) -> TestClient:
    endpoint = Endpoint.at(fake.url)
    app = create_app(endpoint, look(endpoint), LOOPBACK)
    return TestClient(app, base_url="http://127.0.0.1:7210")


def events(page: TestClient, **changed: Any) -> list[dict[str, Any]]:
    answer = page.post("/api/answer", json=ASK | changed)
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "text"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_an_answer_comes_token_by_token(
    page: TestClient, fake: StreamingFake, plain: bool, k: int
) -> None:
    *pieces, end = events(page, k=k, plain=plain)
    assert [piece["text"] for piece in pieces] == [fake.words[token] for token in fake.tokens]
    kinds = kinds_of(k, len(fake.tokens))
    assert "".join(piece["kinds"] for piece in pieces) == kinds
    assert pieces[0]["prompt_ids"] == [0, 1, 2] and pieces[0]["ms"] is None
    assert all(piece["ms"] > 0 for piece in pieces[1:]) and pieces[-1]["reason"] == "length"
    summary = pieces[-1]["summary"]
    assert [summary["full"], summary["lora"]] == [kinds.count("F"), kinds.count("L")]
    assert summary["kv_stock"] == 3 + len(fake.tokens) - 1
    assert summary["kv_written"] == summary["kv_stock"] - kinds.count("L")
    assert end["counted"] == {"full": kinds.count("F"), "lora": kinds.count("L")}
    (asked,) = fake.asked
    assert asked["vllm_xargs"] == {"lora_drop_k": k, "lora_drop_steps": 1}
    assert ("prompt" in asked) == plain


def test_a_score_is_the_base_models_opinion(page: TestClient, fake: StreamingFake) -> None:
    ids = [*fake.tokens, 2, 4]
    scores = page.post("/api/score", json={"prompt_ids": [0, 1], "ids": ids}).json()
    (asked,) = fake.asked
    assert asked["prompt"] == [0, 1, *ids] and asked["vllm_xargs"] == {"lora_drop_k": 0}
    opinions = scores["opinions"]
    assert [opinion["text"] for opinion in opinions] == [fake.words[token] for token in ids]
    for token, opinion in zip(ids, opinions):
        assert opinion["unlikely"] == (token > 2), "0.6 / 10 lies between 0.1 and 0.05"
        assert opinion["probability"] == pytest.approx(TOP[token] if token < 5 else OTHER)
        assert opinion["rank"] == token + 1
        assert [candidate["text"] for candidate in opinion["top"]] == fake.words[:5]
        chosen = [candidate["chosen"] for candidate in opinion["top"]]
        assert chosen == [n == token for n in range(5)]
    assert scores["agreement"] == pytest.approx(2 / 11)
    assert scores["unlikely"] == 7


def test_an_answer_that_fills_the_model_is_scored_but_for_its_last_token(
    page: TestClient, fake: StreamingFake
) -> None:
    written = {"prompt_ids": [0] * (MAX_LEN - 4), "ids": [1, 2, 3, 4]}
    assert len(page.post("/api/score", json=written).json()["opinions"]) == 3
    assert len(fake.asked[0]["prompt"]) == MAX_LEN - 1


def test_what_is_served(page: TestClient, fake: StreamingFake) -> None:
    served = page.get("/api/served").json()
    assert served["k"] == 3 and served["drop_layers"] == [10, 11, 12]
    assert served["attention_only"] == [12]
    assert served["num_layers"] == 30 and served["max_len"] == MAX_LEN
    assert served["url"] == fake.url and served["title"] == "fake"


# what goes wrong


def test_a_refusal_is_told_in_the_servers_words(page: TestClient, fake: StreamingFake) -> None:
    fake.refusal = "This model's maximum context length is 512 tokens."
    (event,) = events(page)
    assert event == {"error": f"The server refuses this request: {fake.refusal}"}
    answer = page.post("/api/score", json={"prompt_ids": [0], "ids": [1]})
    assert answer.status_code == 502 and fake.refusal in answer.json()["error"]


def test_a_server_that_stops_in_the_middle(page: TestClient, fake: StreamingFake) -> None:
    fake.cut_after = 4
    *pieces, error = events(page)
    assert len(pieces) == 4
    assert "does not answer, or stopped in the middle" in error["error"]


def test_a_server_that_is_gone(page: TestClient, fake: StreamingFake) -> None:
    fake.gone = True
    (event,) = events(page)
    assert fake.url in event["error"] and "start it again" in event["error"]


def test_a_server_that_cannot_tell_the_kinds(page: TestClient, fake: StreamingFake) -> None:
    fake.tells = False
    assert "does not tell the kinds of its steps" in events(page)[-1]["error"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        ASK | {"messages": []},
        ASK | {"messages": [{"role": "tool", "content": "x"}]},
        ASK | {"k": "three"},
        {"prompt_ids": [1]},
    ],
)
def test_a_body_without_sense_is_a_422(page: TestClient, fake: StreamingFake, body: Any) -> None:
    for route in ("answer", "code", "score"):
        assert page.post(f"/api/{route}", json=body).status_code == 422
    assert not fake.asked


# nothing for anybody else


@pytest.mark.parametrize(
    "path", ["/docs", "/openapi.json", "/v1/models", "/metrics", "/page/../app.py"]
)
def test_only_the_pages_own_routes_exist(page: TestClient, path: str) -> None:
    assert page.get(path).status_code == 404
    assert page.post("/v1/completions", json={}).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:7210"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:7210"}, 200),
        ({"Host": "localhost:7210", "Origin": "http://localhost:7210"}, 200),
    ],
)
def test_other_sites_pages_are_refused(
    page: TestClient, fake: StreamingFake, headers: dict[str, str], status: int
) -> None:
    assert page.post("/api/answer", json=ASK, headers=headers).status_code == status
    assert bool(fake.asked) == (status == 200)


def test_a_form_of_another_site_is_no_request(page: TestClient, fake: StreamingFake) -> None:
    """Browsers send these without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = page.post("/api/answer", content=json.dumps(ASK), headers={"Content-Type": kind})
        assert answer.status_code == 422
    assert not fake.asked


def test_the_page_is_small_and_asks_nobody_else(page: TestClient) -> None:
    answer = page.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "//" not in policy
    total = len(answer.content)
    for file in PAGE.iterdir():
        if file.name != "index.html":
            answer = page.get(f"/page/{file.name}")
            assert answer.status_code == 200
            total += len(answer.content)
        addresses = re.findall(r"\w+://[^\s\"'`)]+", file.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, file
        assert not re.search(
            r"innerHTML|insertAdjacentHTML|document\.write|eval\(", file.read_text()
        )
    assert total < 100_000


def test_a_key_reaches_the_server_and_nobody_else(
    fake: StreamingFake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = Endpoint.at(fake.url)
    page = TestClient(create_app(endpoint, look(endpoint), LOOPBACK), base_url="http://localhost")
    seen = [page.get("/").text, page.get("/api/served").text]
    seen.append(page.post("/api/answer", json=ASK).text)
    seen.append(page.post("/api/code", json=ASK).text)
    fake.refusal = "no"
    seen.append(page.post("/api/answer", json=ASK).text)
    assert {h["authorization"] for h in fake.headers} == {f"Bearer {KEY}"}
    assert KEY not in "".join([*seen, *capfd.readouterr()])
    assert "$OPENAI_API_KEY" in page.post("/api/code", json=ASK).json()["curl"]


# copied code


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "text"])
def test_copied_code_runs(page: TestClient, fake: StreamingFake, plain: bool) -> None:
    code = page.post("/api/code", json=ASK | {"plain": plain}).json()
    ran = subprocess.run([sys.executable, "-c", code["python"]], capture_output=True, text=True)
    text = "".join(fake.words[token] for token in fake.tokens)
    assert ran.stdout == f"{text}\n{kinds_of(3, 9)}\n", ran.stderr
    ran = subprocess.run(["sh", "-c", code["curl"]], capture_output=True, text=True)
    assert ran.stdout.count("data: ") >= len(fake.tokens) and "lora_drop_steps" in ran.stdout
    events(page, plain=plain)
    by_python, by_curl, by_page = fake.asked
    assert by_python == by_page == by_curl


def test_hanging_up_hangs_up_on_the_server(page: TestClient, fake: StreamingFake) -> None:
    import http.client

    import uvicorn

    fake.tokens, fake.pause = fake.tokens * 100, 0.01
    server = uvicorn.Server(uvicorn.Config(page.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    port = server.servers[0].sockets[0].getsockname()[1]
    reader = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Content-Type": "application/json"}
    reader.request("POST", "/api/answer", json.dumps(ASK), headers)
    assert reader.getresponse().read1(100)
    reader.close()
    assert fake.hung_up.wait(20)
    with contextlib.suppress(Exception):
        server.should_exit = True
        thread.join(10)
