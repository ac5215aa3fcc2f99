"""What a request that asks is told of its steps: the scheduler's own record of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from serving import Serve, Step
from tiny import make_adapter, prompt_of
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from lora_drop_vllm.engine.step_kinds import streaming

pytestmark = pytest.mark.engine


def ask(engine: Any, prompts: list[list[int]], counts: list[int], **more: Any) -> list[Any]:
    """Outputs of requests of which every second one asks for the kinds of its steps."""
    params = [
        SamplingParams(
            temperature=0,
            ignore_eos=True,
            max_tokens=count,
            extra_args={"lora_drop_steps": 1} if n % 2 == 0 else None,
            **more,
        )
        for n, count in enumerate(counts)
    ]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs: list[Any] = engine.llm.generate(given, params, use_tqdm=False)
    return outputs


def recorded(steps: list[Step], request_id: str, prompt: int, tokens: int) -> str:
    """Letters of the steps that sampled a request's tokens; the last that did so counts."""
    sampled_in: dict[int, str] = {}
    for step in steps:
        position, count = step.requests.get(request_id, (0, 0))
        sampled_in[position + count] = step.kind[0].upper()  # a chunk's entry is overwritten
    return "".join(sampled_in[prompt + n] for n in range(tokens))


@pytest.mark.runners
@pytest.mark.parametrize("pool", [{}, {"num_gpu_blocks_override": 9}], ids=["joins", "preemption"])
def test_the_letters_are_the_schedulers_record(
    serve: Serve, models: dict[str, Path], tmp_path: Path, pool: dict[str, int]
) -> None:
    make_adapter(tmp_path, models["llama"], drop_layers=[3, 5])
    engine = serve(
        models["llama"], {"adapter": str(tmp_path)}, max_num_seqs=3, max_model_len=192, **pool
    )
    engine.record()
    lengths, counts = (60, 40, 80, 30, 70, 90), [70, 17, 50, 9, 64, 40]
    outputs = ask(engine, [prompt_of(n) for n in lengths], counts)
    ids = list(dict.fromkeys(i for step in engine.steps for i in step.requests))
    started = [sum(step.requests.get(i, (1, 0))[0] == 0 for step in engine.steps) for i in ids]
    assert (max(started) > 1) == bool(pool), "preempted"
    for n, (name, output) in enumerate(zip(ids, outputs, strict=True)):
        if n % 2:
            assert output.kv_transfer_params is None
            continue
        told = output.kv_transfer_params["lora_drop_steps"]
        assert told == recorded(engine.steps, name, lengths[n], counts[n])
        assert told[0] == "F" and "L" in told and "LLLL" not in told
    assert len(engine.scheduler.step_kinds) == 0


@pytest.mark.parametrize(
    ("value", "more", "message"),
    [
        (2, {}, "expected 1"),
        ("yes", {}, "expected 1"),
        (1, {"n": 2}, "cannot be combined with n=2"),
    ],
)
def test_what_cannot_be_told_is_refused(
    serve: Serve, models: dict[str, Path], value: Any, more: dict[str, Any], message: str
) -> None:
    engine = serve(models["llama"], {"untrained": True})
    params = SamplingParams(extra_args={"lora_drop_steps": value}, max_tokens=2, **more)
    with pytest.raises(VLLMValidationError, match=rf"xargs.lora_drop_steps=.*{message}"):
        engine.llm.generate([{"prompt_token_ids": [5]}], params, use_tqdm=False)


def test_a_server_without_lora_steps_says_so(serve: Serve, models: dict[str, Path]) -> None:
    engine = serve(models["llama"], {"untrained": True, "k": 0})
    with pytest.raises(
        VLLMValidationError, match=r"lora_drop_steps=1: LoRA-Drop is off on this server"
    ):
        ask(engine, [[5, 6]], [3])


# the stream of the HTTP server, with a generator in the place of vLLM's


def result(letters: str, **tokens: int) -> Any:
    """A `RequestOutput` with so many new tokens of each choice (`c0=1`) and the letters so far."""
    outputs = [
        SimpleNamespace(index=int(name[1:]), token_ids=[7] * count)
        for name, count in tokens.items()
    ]
    return SimpleNamespace(outputs=outputs, kv_transfer_params={"lora_drop_steps": letters})


async def original(self: Any, request: Any, result_generator: Any, silent: str = "") -> Any:
    """A chunk a result, like vLLM's; `silent` are results that its parser keeps back."""
    yield 'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
    n = 0
    async for item in result_generator:
        prompt, result = item if isinstance(item, tuple) else (0, item)
        for output in result.outputs:
            choice = {"index": output.index + prompt, "text": "é", "token_ids": output.token_ids}
            if str(n) not in silent:
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        n += 1
    yield "data: [DONE]\n\n"


def stream(results: list[Any], request: Any, **more: Any) -> list[str]:
    async def feed() -> AsyncIterator[Any]:
        for item in results:
            yield item

    async def collect() -> list[str]:
        return [event async for event in streaming(original)(None, request, feed(), **more)]

    return asyncio.run(collect())


def letters(events: list[str]) -> list[tuple[int, str]]:
    chunks = [json.loads(event[6:])["choices"][0] for event in events[1:-1]]
    assert all(len(c["lora_drop_steps"]) == len(c["token_ids"]) for c in chunks)
    return [(chunk["index"], chunk["lora_drop_steps"]) for chunk in chunks]


def asking() -> Any:
    return SimpleNamespace(vllm_xargs={"lora_drop_steps": 1}, n=1, return_token_ids=None)


def test_each_chunk_has_the_letters_of_its_tokens() -> None:
    request = asking()
    merged = [result("F", c0=1), result("FLLL", c0=3), result("FLLLF", c0=1)]
    events = stream(merged, request)
    assert letters(events) == [(0, "F"), (0, "LLL"), (0, "F")]
    assert request.return_token_ids and events[-1] == "data: [DONE]\n\n" and "role" in events[0]
    assert "é" in events[1]


def test_every_prompt_of_a_request_has_letters_of_its_own() -> None:
    results = [(0, result("F", c0=1)), (1, result("FL", c0=2)), (0, result("FLF", c0=2))]
    assert letters(stream(results, asking())) == [(0, "F"), (1, "FL"), (0, "LF")]


def test_who_does_not_ask_gets_vllms_own_stream() -> None:
    request = SimpleNamespace(vllm_xargs=None, n=1, return_token_ids=None)
    events = stream([result("F", c0=1)], request)
    assert not any("lora_drop" in event for event in events) and request.return_token_ids is None
