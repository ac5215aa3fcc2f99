"""Prompts wait for the next full step: when, how long, and what they share it with.

On engines that keep books only; every step there is held to the rule (`dry_engine.py`), and
`test_scheduler_model.py` does so in random lives.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from serving import Serve
from tiny import prompt_of

pytestmark = pytest.mark.engine

K = 3
BOTH = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])


def decoding(dry: Any, steps: int = 1, **setup: Any) -> Any:
    """An engine with one request that has a long answer ahead, after so many steps."""
    engine = dry(k=K, max_model_len=100, **setup)
    engine.add([3, 4], 90)
    for _ in range(steps):
        engine.step()
    return engine


def steps_until_taken(engine: Any, *names: str) -> int:
    """Steps that leave these waiting."""
    count = 0
    while engine.waiting() & {*names}:
        engine.step()
        count += 1
    return count - 1


def steps_to_first_token(engine: Any, name: str) -> int:
    """Steps until the client gets its first token."""
    count = 0
    while not engine.sent[name]:
        engine.step()
        count += 1
    return count


@BOTH
@pytest.mark.parametrize("phase", range(K + 1))
def test_a_prompt_waits_out_the_cycle_and_no_longer(
    dry: Any, async_scheduling: bool, phase: int
) -> None:
    engine = decoding(dry, 1 + phase, async_scheduling=async_scheduling)
    others = [engine.add([3] * 5, 20), engine.add([4], 20), engine.add([4, 4], 20)]
    assert steps_until_taken(engine, *others) == K - phase
    for _ in range(6):
        engine.step()
    assert engine.kinds == (["full", *["lora"] * K] * 9)[: len(engine.kinds)]


def test_now_makes_a_full_step_at_once(dry: Any) -> None:
    engine = decoding(dry, 2, prompts="now")
    assert steps_until_taken(engine, engine.add([3] * 5, 20)) == 0
    assert engine.kinds == ["full", "lora", "full"]


@BOTH
def test_nobody_waits_where_nobody_decodes(dry: Any, async_scheduling: bool) -> None:
    """At first, and when the last token of the only other request is under way."""
    engine = dry(k=K, async_scheduling=async_scheduling)
    first = engine.add([3, 4], K)
    assert steps_until_taken(engine, first) == 0
    for _ in range(K - 1):
        engine.step()
    assert engine.kinds == ["full", *["lora"] * (K - 1)]
    assert len(engine.sent[first]) == K - async_scheduling
    assert steps_until_taken(engine, engine.add([3] * 5, 2)) == 0


def test_a_request_without_lora_steps_keeps_nobody_waiting(dry: Any) -> None:
    engine = decoding(dry)
    assert steps_until_taken(engine, engine.add([3, 3], 20, k=0)) == K
    assert steps_until_taken(engine, engine.add([3] * 5, 20)) == 0


def test_a_request_whose_grammar_is_compiled_hurries_nobody(dry: Any) -> None:
    """No step could take it, so the others wait as if it were not there."""
    from vllm.v1.request import RequestStatus

    engine = decoding(dry)
    name = engine.add([5] * 4, 5)
    engine.books[name].deferred = -1000  # the engine's check of the rule knows no grammars
    request = engine.scheduler.requests[name]
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = SimpleNamespace(grammar=None)
    for _ in range(2 * (K + 1)):
        engine.step()
    assert steps_until_taken(engine, engine.add([3] * 5, 20)) == K
    assert engine.kinds == ["full", *["lora"] * K] * 3 + ["full"]


def test_a_k_that_nobody_checked_is_the_served_one(dry: Any) -> None:
    engine = dry(k=K)
    engine.books[engine.add([3, 4], 3 * K, k=99)].k = K
    engine.finish()
    assert engine.kinds[: K + 2] == ["full", *["lora"] * K, "full"]


@pytest.mark.parametrize("phase", range(K + 1))
@pytest.mark.parametrize("chunks", [2, 3, 6])
@pytest.mark.parametrize("limit", ["the budget", "a chunk"])
def test_a_prompt_of_several_chunks_takes_at_most_twice_its_steps(
    dry: Any, phase: int, chunks: int, limit: str
) -> None:
    """Counted from its arrival; none of the LoRA steps among them is longer than its own."""
    size = {"the budget": {}, "a chunk": {"long_prefill_token_threshold": 8}}[limit]
    taken = {}
    for prompts in ("now", "wait"):
        budget = 9 if limit == "the budget" else 32
        sizes = size | {"max_num_batched_tokens": budget}
        engine = decoding(dry, 1 + phase, prompts=prompts, **sizes)
        name = engine.add([3] * (8 * chunks), 4)
        taken[prompts] = steps_to_first_token(engine, name)
        begun = engine.kinds[-chunks:]
        assert begun == ["full"] * chunks, "once it has begun it goes ahead"
    assert taken["now"] == chunks
    assert taken["wait"] <= 2 * chunks
    assert phase or taken["wait"] > chunks, "it did not wait at all"


def test_prompts_share_the_full_steps_of_a_long_one(dry: Any) -> None:
    engine = decoding(dry, 1, max_num_batched_tokens=16)
    long = engine.add([3] * 40, 4)
    while long in engine.waiting():
        engine.step()
    assert steps_until_taken(engine, engine.add([4] * 3, 4)) <= 2, "when the long one leaves room"
    assert engine.kinds[-1] == "full"


def test_a_prompt_that_is_all_in_the_cache_waits_too(dry: Any) -> None:
    """vLLM schedules its last token with the decodes, which would make their step full."""
    engine = decoding(dry, 1)
    first = engine.add([4] * 9, 4)
    steps_until_taken(engine, first)
    second = engine.add([4] * 9, 4)
    assert steps_until_taken(engine, second) == K
    assert engine.num_cached == 8


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_stream_of_prompts_that_vllm_does_not_defer_starves_nobody(dry: Any, policy: str) -> None:
    """It takes a prompt of one token for a decode. The step is full, but without the others."""
    engine = decoding(dry, 1, policy=policy, max_num_seqs=30)
    waits = engine.add([4] * 5, 4, priority=5)
    for _ in range(2 * K):
        engine.add([3], 1, priority=0)
        engine.step()
    assert waits not in engine.waiting()


def test_nobody_waits_on_a_full_machine(dry: Any) -> None:
    """vLLM's own rule: what a step had to leave behind goes ahead as soon as there is room."""
    engine = decoding(dry, K, max_num_seqs=2)
    short = engine.add([3, 3], 2)
    first, second = engine.add([3, 4], 9), engine.add([4, 4], 2)
    steps_until_taken(engine, short)
    assert engine.scheduler.prefill_capacity_bound
    ends = steps_until_taken(engine, first)
    assert engine.sent[short] and ends == 1
    assert second in engine.waiting()
    assert engine.num_cached == 2, "a step that does not defer gives up no prefix hit"


def test_a_cadence_of_vllms_own_starves_nobody(dry: Any) -> None:
    """Data parallelism of experts defers prompts in all but every nth step, out of step with us."""
    engine = decoding(dry, 1)
    scheduler, cadence = engine.scheduler, itertools.cycle([True, False, True, True])
    schedule = scheduler.schedule

    def with_cadence() -> Any:
        output = schedule(next(cadence))
        scheduler.deferred &= scheduler._defers  # only what we defer is held to our bound
        return output

    scheduler.schedule = with_cadence
    assert steps_until_taken(engine, engine.add([4] * 5, 4)) <= 2 * K


def test_the_real_engine_keeps_its_lora_steps_under_arrivals(
    serve: Serve, models: dict[str, Any]
) -> None:
    """A prompt every other step: `now` runs hardly any LoRA step, `wait` all of them."""
    from vllm import SamplingParams

    shares = {}
    for prompts in ("wait", "now"):
        settings = {"untrained": True, "k": K, "prompts": prompts}
        engine = serve(models["llama"], settings)
        engine.record()
        core = engine.llm.llm_engine
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
        core.add_request("0", {"prompt_token_ids": prompt_of(5)}, params)
        for n in range(1, 40):
            if n % 2 and n < 30:
                core.add_request(str(n), {"prompt_token_ids": prompt_of(5, n)}, params)
            core.step()
        kinds = [step.kind for step in engine.steps][:30]
        shares[prompts] = kinds.count("lora") / len(kinds)
    assert shares["wait"] >= 0.9 * K / (K + 1)
    assert shares["now"] <= 0.5
