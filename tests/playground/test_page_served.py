"""`lora-drop playground MODEL --adapter DIR` in Chromium, a served tiny model behind it."""

from __future__ import annotations

import json
import math
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import chromium, playground
from environment import V2

from lora_drop_vllm.server_process import Endpoint

pytestmark = [
    pytest.mark.browser,
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the interpreter needs a stand-in backend in every process"),
]

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
TOKENS = 40


@pytest.fixture(scope="module")
def model(smooth_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smooth model with a chat template, saying printable characters only."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    network = tiny.load_model(smooth_model)
    texts = [tokenizer.decode([n]) for n in range(tiny.VOCAB)]
    mute = [n for n, text in enumerate(texts) if not (len(text) == 1 and " " <= text <= "~")]
    network.lm_head.weight.data[mute] = 0.0
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    adapter = tmp_path_factory.mktemp("adapter")
    tiny.make_adapter(adapter, model, drop_layers=[3, 4, 6])
    with playground(str(model), "--adapter", str(adapter), "--dtype", "float32") as found:
        yield found


@pytest.fixture(scope="module")
def server(address: str) -> Endpoint:
    """The vLLM behind the page."""
    with urllib.request.urlopen(f"{address}/api/served") as answer:
        return Endpoint.at(json.load(answer)["url"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    opened = browser.new_page()
    opened.goto(address)
    opened.wait_for_selector("#served li")
    yield opened
    opened.close()


def run(page: Any, **settings: Any) -> None:
    page.evaluate("document.querySelector('details').open = true")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.click("#run")
    page.wait_for_selector("#run:enabled", timeout=120_000)


def kinds(page: Any, column: str) -> str:
    return "".join(
        span.get_attribute("data-kinds") for span in page.query_selector_all(f"#{column} .token")
    )


def post(server: Endpoint, route: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{server.url}/v1/{route}",
        json.dumps({"model": server.name, "temperature": 0} | body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_tinted_tokens_are_the_lora_steps_the_server_counts(page: Any, server: Endpoint) -> None:
    before = server.metrics()
    run(page, prompt="Tell me", max_tokens=TOKENS)
    used = {name: value - before[name] for name, value in server.metrics().items()}
    assert kinds(page, "base") == "F" * TOKENS
    told = kinds(page, "lora")
    assert told == ("FLLL" * TOKENS)[:TOKENS]
    assert used["lora_steps"] == told.count("L") == 30
    scores = 2  # each answer once as a prompt, a full step
    assert used["full_steps"] == TOKENS + told.count("F") + scores
    assert len(page.query_selector_all("#lora .token.lora")) == 30
    assert page.inner_text("#lora [data-figure=share]") == "75 % 30 of 40"
    written, stock = page.inner_text("#lora [data-figure=kv]").split(" of ")
    assert int(stock) - int(written) == used["kv_slots_skipped"]


def test_underlined_tokens_are_those_a_direct_request_finds(page: Any, server: Endpoint) -> None:
    run(page, prompt="Tell me", max_tokens=TOKENS)
    message = {"role": "user", "content": "Tell me"}
    answer = post(
        server, "chat/completions", messages=[message], max_tokens=TOKENS, return_token_ids=True
    )
    ids = answer["choices"][0]["token_ids"]
    prompt = answer["prompt_token_ids"]
    scored = post(server, "completions", prompt=prompt + ids, max_tokens=1, prompt_logprobs=5)
    given = scored["choices"][0]["prompt_logprobs"][len(prompt) :]
    right = []
    for n, (token, entry) in enumerate(zip(ids, given, strict=True)):
        best = max(math.exp(e["logprob"]) for e in entry.values())
        if math.exp(entry[str(token)]["logprob"]) < best / 10:
            right.append(n)
    spans = page.query_selector_all("#lora .token.unlikely")
    assert [int(span.get_attribute("data-start")) for span in spans] == right
    assert 0 < len(right) < TOKENS, "nothing was tested"
    assert not page.query_selector_all("#base .token.unlikely")
    assert page.inner_text("#base [data-figure=agreement]") == "100 %"
    logprobs = [entry[str(token)]["logprob"] for token, entry in zip(ids, given)]
    shown = float(page.inner_text("#lora [data-figure=mean_logprob]"))
    assert shown == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-3)


def test_stop_aborts_the_request(page: Any, server: Endpoint) -> None:
    page.evaluate("document.querySelector('details').open = true")
    page.fill("#prompt", "Tell me")
    page.fill("#max_tokens", "1900")
    page.click("#run")
    page.wait_for_selector("#base .token:nth-child(3)", timeout=60_000)
    page.click("#stop")
    page.wait_for_selector("#run:enabled", timeout=60_000)
    deadline = time.monotonic() + 30
    while server.metrics()["kv_blocks"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metrics()["kv_blocks"] == 0
    running = [n for n in server.metrics_text().splitlines() if "vllm:num_requests_running{" in n]
    assert running and all(line.endswith(" 0.0") for line in running)
    assert len(page.query_selector_all("#base .token")) < 1900
    assert "Stopped." in page.inner_text("#base")


def test_a_prompt_too_long_is_told_in_vllms_words(page: Any) -> None:
    run(page, prompt="word " * 1000, max_tokens=TOKENS)
    for column in ("base", "lora"):
        error = page.inner_text(f"#{column} [role=alert]")
        assert error.startswith("The server refuses this request:") and "2048" in error


def test_a_link_brings_its_settings_back(page: Any, browser: Any) -> None:
    run(page, prompt="Tell me", max_tokens=9, k=1)
    other = browser.new_page()
    other.goto(page.url)
    other.wait_for_selector("#served li")
    assert [other.input_value(f"#{name}") for name in ("prompt", "max_tokens", "k")] == [
        "Tell me",
        "9",
        "1",
    ]
    other.reload()
    other.wait_for_selector("#served li")
    run(other)
    assert kinds(other, "lora") == "FLFLFLFLF"
    assert other.text_content("#lora .answer") == page.text_content("#lora .answer")
    other.close()


def test_plain_text_and_drawn_tokens(page: Any) -> None:
    page.evaluate("document.querySelector('details').open = true")
    page.check("#plain")
    run(page, prompt="Tell me", max_tokens=12, temperature=1, seed=7)
    first = page.text_content("#base .answer")
    page.click("#new")
    run(page, prompt="Tell me")
    assert page.text_content("#base .answer") == first, "the seed is not used"
    assert kinds(page, "lora") == "FLLLFLLLFLLL"
