"""The offline engine that writes text: the stock model, and a model with an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from serving import settings_of
from tiny import load_model, make_adapter, prompt_of

from lora_drop_vllm.engine import offline_generation
from lora_drop_vllm.engine.offline_generation import Completion, Request, start_engine

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_generation, "_cpu_has_bfloat16", lambda: False)


@contextmanager
def running(model: str, adapter: Path | None = None) -> Iterator[Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = start_engine(model, 16, 256, adapter)
    try:
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def test_an_adapter_answers_as_it_is_served(smooth_model: Path, tmp_path: Path) -> None:
    config, tensors = make_adapter(tmp_path, smooth_model, drop_layers=[3, 5], k=3)
    base, prompt = load_model(smooth_model), prompt_of(9)
    want = Oracle(base, settings_of(config, tensors)).decode(prompt, 24)
    stock = base.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, 9:]
    assert want != stock.tolist()
    with running(str(smooth_model), tmp_path) as engine:
        (answer,) = engine([Request(prompt, 24, 0)])
    assert answer.tokens == want


def test_the_engine_continues_as_asked(smooth_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text is that of transformers; texts end at a token, at the limit or in a loop.

    Seeds count. Some prompts have more tokens than an engine step takes.
    """
    monkeypatch.setattr(offline_generation, "STEP_TOKENS", 256)
    prompt = prompt_of(9)
    want = (
        load_model(smooth_model)
        .generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
        .tolist()[len(prompt) :]
    )
    with running(str(smooth_model)) as engine:
        many = [Request(prompt_of(150, seed), 24, seed, 1.0) for seed in range(8)]
        first, *others = engine([Request(prompt, 24, 0), *many])
        assert first == Completion(first.text, want, "length")
        assert engine(many) == others and len({tuple(x.tokens) for x in others}) == 8
        again, other = engine([many[0], replace(many[0], seed=9)])
        assert again == others[0] != other
        stop = Request(prompt, 24, 0, stop=(want[5],))
        (stopped,) = engine([stop])
        assert stopped.tokens == want[: want.index(want[5])] and stopped.end == "stop"
        sampling = offline_generation._sampling

        def one_word(request: Request) -> Any:
            found = sampling(request)
            found.allowed_token_ids = [7]
            return found

        monkeypatch.setattr(offline_generation, "_sampling", one_word)
        (loop,) = engine([Request(prompt, 99, 0)])
        assert loop.end == "repetition" and len(loop.tokens) < 99
        assert engine.facts["device"] == "cpu" and engine.facts["dtype"] == "float32"
