"""The simulation under load: real scheduling, with times that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from support.engines import SHAPES
from support.load import dry_core
from support.load.client import Offer, Shape
from support.load.cost_model import Machine
from support.load.scenario import Scenario
from support.load.simulation import Arrival, Engine, arrivals

pytestmark = pytest.mark.engine

# steps take a second each, whatever they do
SECONDS = Machine("a second a step", bandwidth=1e30, flops=1e30, step_s=1.0)


@pytest.fixture(scope="module")
def scenario(models: dict[str, Path]) -> Callable[..., Scenario]:
    prepared = dry_core.prepare(models["llama"])

    def make(**changed: Any) -> Scenario:
        plain: dict[str, Any] = dict(
            prepared=prepared,
            machine=SECONDS,
            config=SHAPES["135m"],
            size=2,
            num_drop=13,
            k=3,
            pool=1 << 28,
            max_requests=4,
            max_batched_tokens=64,
            async_scheduling=False,
        )
        return Scenario(**(plain | changed))

    return make


def serve(scenario: Scenario, name: str, coming: list[Arrival]) -> Any:
    shape = Shape(8, 16)
    core = scenario.core(name, shape)
    return Engine(scenario.prepared, core, scenario.machine, scenario.model(name)).serve(coming)


@pytest.mark.parametrize("name", ["stock", "now", "wait"])
def test_a_lone_request_takes_a_step_a_token(scenario: Callable[..., Scenario], name: str) -> None:
    found = serve(scenario(), name, [Arrival(2.5, 8, 9)])
    assert found.ttft_ms == [1000] and found.tpot_ms == [1000]
    assert found.seconds == 11.5 and found.counts["steps"] == 9
    if name != "stock":  # the prompt, then twice 3 LoRA steps and a full one
        assert (found.counts["full"], found.counts["lora"]) == (3, 6)


@pytest.mark.parametrize(
    ("name", "waited", "lora"), [("stock", 1.9, 0), ("now", 1.9, 8), ("wait", 3.9, 9)], ids=str
)
def test_a_second_prompt_waits_for_the_next_full_step(
    scenario: Callable[..., Scenario], name: str, waited: float, lora: int
) -> None:
    """It comes in the second of the first request's 12 steps, of which the 5th is full."""
    found = serve(scenario(), name, [Arrival(0.0, 8, 12), Arrival(1.1, 8, 3)])
    assert sorted(found.ttft_ms) == pytest.approx([1000, 1000 * waited])
    assert found.counts.get("lora", 0) == lora and found.counts["steps"] == 12


def test_a_tight_pool_preempts(scenario: Callable[..., Scenario]) -> None:
    """Blocks of 16 tokens in 30 layers; each request grows to two of them."""
    block = 16 * 30 * 768  # tokens, layers, bytes of a token in a layer
    tight = scenario(pool=4 * block, max_requests=3)
    coming = [Arrival(0.0, 8, 16)] * 3
    found = serve(tight, "stock", coming)
    assert found.counts["preemptions"] and len(found.ttft_ms) == 3
    assert max(found.kv_used) == 1
    assert not serve(scenario(), "stock", coming).counts["preemptions"]


def test_an_asynchronous_engine_learns_of_arrivals_a_step_late(
    scenario: Callable[..., Scenario],
) -> None:
    coming = [Arrival(0.0, 8, 6), Arrival(1.1, 8, 3)]
    found = serve(scenario(async_scheduling=True), "stock", coming)
    assert sorted(found.ttft_ms) == pytest.approx([1000, 2900])


def test_the_client_may_hold_requests_back(scenario: Callable[..., Scenario]) -> None:
    found = scenario().run("stock", Shape(8, 5), Offer(3, at_once=1))
    assert found.seconds == 15 and found.ttft_ms == [1000] * 3
    assert scenario().run("stock", Shape(8, 5), Offer(3)).seconds == 5
    assert scenario().saturation(Shape(8, 5)) == 4 / 5


def test_arrivals_come_at_the_rate() -> None:
    found = arrivals(Shape(100, 50), Offer(1000, rate=20.0, seed=1), spread=0.5)
    assert found[-1].at == pytest.approx(50)
    assert found != arrivals(Shape(100, 50), Offer(1000, rate=20.0, seed=2), spread=0.5)
    assert 50 <= min(a.prompt for a in found) < 55 and 145 < max(a.prompt for a in found) <= 150
    gaps = [b.at - a.at for a, b in zip(found, found[1:])]
    assert sum(gap > 0.05 for gap in gaps) / len(gaps) == pytest.approx(0.37, abs=0.05)  # 1/e
