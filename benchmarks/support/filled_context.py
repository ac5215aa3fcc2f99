"""A long context without its computation: prompts enter the prefix cache, their KV is a constant.

The time of a decode step does not depend on the values of the keys and values that it reads.
"""

from __future__ import annotations

from typing import Any

VALUE = 0.01


def write_cache(engine: Any) -> None:
    """Writes all of an engine's KV cache, so that steps read memory.

    Linux backs pages that nobody has written with one page of zeros, which stays in the CPU's
    cache.
    """
    for cache in engine.model_executor.driver_worker.worker.model_runner.kv_caches:
        cache.fill_(VALUE)


def fill(engine: Any, prompts: list[list[int]]) -> None:
    """Takes prompts through the scheduler alone, so that the same prompts are prefix hits next.

    Args:
        engine: vLLM's engine in this process, without a request and with prefix caching
    """
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    core = engine.engine_core.engine_core
    scheduler, params = core.scheduler, SamplingParams(max_tokens=1)
    for n, ids in enumerate(prompts):
        name, hasher = f"filled-{n}", core.request_block_hasher
        scheduler.add_request(Request(name, ids, params, None, block_hasher=hasher))
    while scheduler.has_unfinished_requests():
        planned = scheduler.schedule()
        names = list(planned.num_scheduled_tokens)
        ends = [r.num_computed_tokens >= r.num_tokens for r in map(scheduler.requests.get, names)]
        tokens = [[0] if end else [] for end in ends]
        places = {name: n for n, name in enumerate(names)}
        scheduler.update_from_output(planned, ModelRunnerOutput(names, places, tokens))
