"""Async scheduling, as GPUs have it: a step is planned while the last one still runs.

vLLM switches it off on a CPU; here it stays on. The engine then plans one step ahead, on tokens
that are not known yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from serving import Engine, Serve, check_all_released, replay, settings_of
from tiny import make_adapter, prompt_of

pytestmark = [pytest.mark.engine, pytest.mark.runners]

PROMPTS, COUNTS = [prompt_of(n) for n in (5, 40, 11)], [9, 5, 12]


@pytest.fixture
def stay_async(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU platform leave async scheduling as it is."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    update = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))


def start(serve: Serve, model: Path, adapter: Path, **args: Any) -> tuple[Engine, Any, Any]:
    """An engine that plans ahead, and what the oracle needs."""
    config, tensors = make_adapter(adapter, model, drop_layers=[3, 4, 6], k=2)
    engine = serve(model, {"adapter": str(adapter)}, async_scheduling=True, max_num_seqs=4, **args)
    assert engine.scheduler.vllm_config.scheduler_config.async_scheduling
    assert engine.core.batch_queue is not None
    engine.record()
    return engine, config, tensors


def check(engine: Engine, outputs: list[Any], hf_model: Any, settings: Any) -> None:
    """Every request has the tokens that the oracle has for the recorded kinds of step."""
    ids = list(dict.fromkeys(i for step in engine.steps for i in step.requests))
    for request_id, prompt, output in zip(ids, PROMPTS, outputs, strict=True):
        oracle = Oracle(hf_model, settings)
        want = replay(engine.steps, request_id, prompt, oracle, forgets=True)
        assert output.tokens == want[: len(output.tokens)]
    check_all_released(engine)
    assert engine.counts()["lora"] > 0


@pytest.mark.usefixtures("stay_async")
def test_steps_planned_ahead_give_the_oracles_tokens(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path
) -> None:
    engine, config, tensors = start(serve, models["llama"], tmp_path)
    outputs = engine.generate(PROMPTS, COUNTS)
    assert [len(output.tokens) for output in outputs] == COUNTS
    check(engine, outputs, hf_models["llama"], settings_of(config, tensors))


@pytest.mark.usefixtures("stay_async")
def test_the_prefix_cache_is_reset_under_running_requests(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All requests start over while a step of theirs is under way, as after a sleep with `keep`."""
    engine, config, tensors = start(serve, models["llama"], tmp_path)
    schedule, calls = engine.scheduler.schedule, []

    def resetting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 6:
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "schedule", resetting)
    outputs = engine.generate(PROMPTS, COUNTS)
    assert [len(output.tokens) for output in outputs] == COUNTS
    check(engine, outputs, hf_models["llama"], settings_of(config, tensors))
