"""vLLM's features on one served tiny model, by public clients: the rows of docs/compatibility.md.

Each test also counts LoRA steps: a feature that made every step full would work without LoRA-Drop.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_models import make_chat_model, make_chat_tokenizer
from prometheus import dashboard_queries, scraping

from lora_drop_vllm.server_process import Server

pytestmark = pytest.mark.engine

SETTINGS = {"lora_drop": {"untrained": True, "rho": 0.5, "k": 3}}
ARGUMENTS = [
    *("--model-impl", "lora_drop", "--additional-config", json.dumps(SETTINGS)),
    *("--dtype", "float32", "--max-num-batched-tokens", "64", "--scheduling-policy", "priority"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # the model likes blanks, which JSON allows between any two tokens
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enable-prompt-tokens-details",
]
USER = {"role": "user", "content": "tell me"}
ANSWER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "ok": {"type": "boolean"}},
    "required": ["city", "ok"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "parameters": ANSWER, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
WITHOUT_LORA_STEPS = ("test_beam_search", "test_embeddings_are_refused")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_chat_model(tmp_path_factory.mktemp("served") / "model", "qwen2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /sleep and /reset_prefix_cache
        with Server(model, ARGUMENTS) as running:
            check_that_layers_drop(running.client())
            yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


@pytest.fixture(autouse=True)
def lora_steps_run(server: Server, request: pytest.FixtureRequest) -> Iterator[None]:
    none = request.node.name in WITHOUT_LORA_STEPS
    if none:  # the test before may have ended at a stop string, with one more step under way
        time.sleep(1)
    before = server.metrics()["lora_steps"]
    yield
    assert (server.metrics()["lora_steps"] == before) == none


def complete(client: Any, prompt: Any = "tell me", tokens: int = 12, **more: Any) -> Any:
    """A greedy completion that does not end early; what `openai` does not know is in the body."""
    known = ("echo", "logit_bias", "logprobs", "n", "seed", "stop", "stream", "stream_options")
    known += ("frequency_penalty", "presence_penalty", "temperature")
    given = {"temperature": 0} | {name: more.pop(name) for name in known if name in more}
    return client.completions.create(
        model="model",
        prompt=prompt,
        max_tokens=tokens,
        extra_body={"ignore_eos": True} | more,
        **given,
    )


def chat(client: Any, tokens: int = 60, **more: Any) -> Any:
    return client.chat.completions.create(
        model="model", messages=[USER], max_tokens=tokens, temperature=0, **more
    )


def ask(server: Server, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer of a route that `openai` has no method for; POST."""
    data = json.dumps({} if body is None else body).encode()
    asked = urllib.request.Request(
        server.url + path, data, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def check_that_layers_drop(client: Any) -> None:
    """The counter is the scheduler's; that the layers do not run shows in the probabilities."""
    ours, base = (
        complete(client, logprobs=1, **more).choices[0].logprobs.token_logprobs
        for more in ({}, {"vllm_xargs": {"lora_drop_k": 0}})
    )
    assert ours[0] == pytest.approx(base[0], abs=1e-5)  # a full step's
    assert max(abs(a - b) for a, b in zip(ours[1:4], base[1:4])) > 1e-3


def test_structured_output_by_json_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
    found = json.loads(chat(client, response_format=form).choices[0].message.content)
    assert found["city"] in ("Rome", "Oslo") and type(found["ok"]) is bool


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[ab]{5}-[0-9]{4}"}, "[ab]{5}-[0-9]{4}"),
        ({"choice": ["to Rome", "to Oslo"]}, "to (Rome|Oslo)"),
        ({"grammar": 'root ::= "go " ("north" | "south") "!"'}, "go (north|south)!"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_structured_output(client: Any, form: dict[str, Any], pattern: str) -> None:
    answer = chat(client, extra_body={"structured_outputs": form})
    assert re.fullmatch(pattern, answer.choices[0].message.content)


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "weather"}}],
    ids=["required", "named"],
)
def test_tool_calls(client: Any, choice: Any) -> None:
    blanks = make_chat_tokenizer("qwen2")(" \n\t\r", add_special_tokens=False).input_ids
    bias = {str(token): -100 for token in blanks}  # allowed in a call, and the model likes them
    answer = chat(client, 200, tools=[TOOL], tool_choice=choice, logit_bias=bias)
    assert answer.choices[0].message.tool_calls, answer.choices[0].message.content
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_logprobs(client: Any) -> None:
    found = complete(client, logprobs=2).choices[0].logprobs
    assert len(found.token_logprobs) == 12
    for chosen, best in zip(found.token_logprobs, found.top_logprobs):
        assert chosen == max(best.values()) <= 0


def test_prompt_logprobs(client: Any) -> None:
    found = complete(client, [5, 9, 44], prompt_logprobs=1).choices[0].prompt_logprobs
    assert found[0] is None and len(found) == 3 and all(found[1:])


def test_echo(client: Any) -> None:
    answer = complete(client, "tell me", echo=True, logprobs=1).choices[0]
    assert answer.text.startswith("tell me") and len(answer.logprobs.tokens) == 7 + 12


def test_several_answers(client: Any) -> None:
    answers = complete(client, n=3, temperature=1.0).choices
    assert len({answer.text for answer in answers}) == 3


def test_seeds(client: Any) -> None:
    first, again, other = (
        complete(client, temperature=1.0, seed=seed).choices[0].text for seed in (7, 7, 8)
    )
    assert first == again != other


def test_stop_strings(client: Any) -> None:
    whole = complete(client).choices[0].text
    stop = whole[8:10]
    answer = complete(client, stop=[stop]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.text == whole.partition(stop)[0] and len(answer.text) > 3


def test_beam_search(client: Any) -> None:
    """vLLM sends each token of a beam as a prompt of its own: full steps only."""
    answers = complete(client, tokens=6, n=2, use_beam_search=True).choices
    assert len({answer.text for answer in answers}) == 2


def test_logit_bias(client: Any) -> None:
    """Token 51 is Q, which the model never writes."""
    assert complete(client, logit_bias={"51": 100}).choices[0].text == "Q" * 12


def test_penalties(client: Any) -> None:
    plain = complete(client, tokens=40).choices[0].text
    for penalty in ("frequency_penalty", "presence_penalty", "repetition_penalty"):
        answer = complete(client, tokens=40, **{penalty: 2.0}).choices[0].text
        assert len(set(answer)) > len(set(plain)), penalty


def test_bad_words(client: Any) -> None:
    word = complete(client).choices[0].text[5]
    assert word not in complete(client, bad_words=[word]).choices[0].text


def test_min_tokens(client: Any) -> None:
    bias = {"logit_bias": {"260": 100}, "ignore_eos": False}  # the end of the turn
    assert complete(client, **bias).usage.completion_tokens == 1
    assert complete(client, min_tokens=9, **bias).usage.completion_tokens == 10


def test_priorities(client: Any) -> None:
    """A server that schedules first come, first served answers 400 to any priority but 0."""
    assert complete(client, priority=5).choices[0].text == complete(client).choices[0].text


def test_prefix_caching_and_its_reset(client: Any, server: Server) -> None:
    prompt = [5, 9, 44, 17] * 40
    first, again = (complete(client, prompt) for _ in range(2))
    assert again.usage.prompt_tokens_details.cached_tokens >= 64
    assert again.choices[0].text == first.choices[0].text
    assert ask(server, "/reset_prefix_cache")[0] == 200
    details = complete(client, prompt).usage.prompt_tokens_details
    assert not details or not details.cached_tokens


def test_chunked_prefill(client: Any, server: Server) -> None:
    before = server.metrics()["prompt_steps"]
    complete(client, [7, 11, 13] * 100)
    assert server.metrics()["prompt_steps"] - before >= 300 / 64


def test_sleep_and_wake_up(client: Any, server: Server) -> None:
    before = complete(client).choices[0].text
    assert ask(server, "/sleep?level=1")[0] == 200
    assert ask(server, "/wake_up")[0] == 200
    assert complete(client).choices[0].text == before


def test_streaming_with_usage(client: Any) -> None:
    chunks = [*complete(client, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage.completion_tokens == 12
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == complete(client).choices[0].text


def test_responses_route(client: Any) -> None:
    answer = client.responses.create(
        model="model", input="tell me", max_output_tokens=12, temperature=0
    )
    assert answer.output_text and answer.usage.output_tokens == 12


def test_messages_route(server: Server) -> None:
    body = {"model": "model", "max_tokens": 12, "messages": [USER], "temperature": 0}
    status, answer = ask(server, "/v1/messages", body)
    assert status == 200 and answer["content"][0]["text"]
    assert answer["usage"]["output_tokens"] == 12


def test_embeddings_are_refused(server: Server) -> None:
    status, _ = ask(server, "/v1/embeddings", {"model": "model", "input": "tell me"})
    assert status == 404


@pytest.mark.skipif(
    not shutil.which("prometheus"),
    reason="Prometheus is not installed: make test-dashboard installs it",
)
def test_every_query_of_the_dashboard_has_data(client: Any, server: Server, tmp_path: Path) -> None:
    with scraping(server.url, tmp_path) as prometheus:
        prometheus.wait_for("vllm:lora_drop_info")  # then the counters grow between two scrapes
        complete(client, tokens=40)
        grown = "rate(vllm:request_time_per_output_token_seconds_count[1m]) > 0"
        prometheus.wait_for(f"{grown} and rate(vllm:lora_drop_lora_steps_total[1m]) > 0")
        for panel, query in dashboard_queries().items():
            values = [float(series["value"][1]) for series in prometheus.query(query)]
            assert values and all(value >= 0 for value in values), panel  # NaN is not
        share = dashboard_queries()["Share of LoRA steps: LoRA steps"]
        assert 0.5 < float(prometheus.query(share)[0]["value"][1]) <= 0.76
