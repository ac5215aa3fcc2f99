"""The method without an engine: schedule, layer choice, cost, rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lora_drop_vllm.method.cost import (
    MIN_SAVING,
    LayerReads,
    ideal_speed,
    kv_saving,
    layers_only_speed,
    packed_block_sizes,
    packed_saving,
    packing_waste,
)
from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers
from lora_drop_vllm.method.schedule import (
    PhaseTracker,
    RequestPhase,
    Row,
    Scheduled,
    StepKind,
    StepPlan,
    longest_wait,
    prompts_wait,
    step_kind,
)
from lora_drop_vllm.method.sites import AdapterSites
from lora_drop_vllm.method.state import StepState

FULL, LORA = StepKind.FULL, StepKind.LORA


def lone_request(tracker: PhaseTracker, prompt: int, count: int) -> list[StepKind]:
    kinds = [tracker.advance([Scheduled("a", 0, prompt)]).kind]
    for n in range(count - 1):
        kinds.append(tracker.advance([Scheduled("a", prompt + n, 1)]).kind)
    return kinds


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_lone_request_refreshes_every_k_plus_1_steps(k: int) -> None:
    tracker = PhaseTracker(4, kv_skips=True)
    tracker.admit("a", k, prompt_end=5)
    assert lone_request(tracker, 5, 12) == ([FULL, *[LORA] * k] * 12)[:12]


def test_a_prompt_pulls_everyone_into_its_full_step() -> None:
    assert step_kind([RequestPhase(False, 1, 3), RequestPhase(True, 0, 3)]) is FULL
    assert step_kind([RequestPhase(False, 1, 3), RequestPhase(False, 0, 3)]) is LORA
    assert step_kind([RequestPhase(False, 3, 3), RequestPhase(False, 0, 3)]) is FULL


RUNNING = {
    "nobody": ([], False),
    "all have LoRA steps left": ([(False, 1, 3), (False, 2, 3)], True),
    "one is due": ([(False, 1, 3), (False, 3, 3)], False),
    "one has none": ([(False, 1, 3), (False, 0, 0)], False),
    "a prompt has begun": ([(False, 1, 3), (True, 0, 3)], False),
}


@pytest.mark.parametrize("case", RUNNING)
def test_prompts_wait_while_the_step_is_a_lora_step_without_them(case: str) -> None:
    phases, wait = RUNNING[case]
    running = [RequestPhase(*phase) for phase in phases]
    assert prompts_wait(running, waited=2, most=3) is wait
    assert not prompts_wait(running, waited=3, most=3)


def test_prompts_of_several_chunks_wait_for_fewer_steps_than_they_take() -> None:
    assert [longest_wait(k, fits=True) for k in (1, 2, 3, 9)] == [1, 2, 3, 9]
    assert [longest_wait(k, fits=False) for k in (1, 2, 3, 9)] == [1, 2, 2, 2]


def test_a_tracked_request_brings_its_phase() -> None:
    tracker = PhaseTracker(1, kv_skips=True)
    tracker.admit("a", 3, prompt_end=2)
    lone_request(tracker, 2, 3)
    assert tracker.phase("a", in_prompt=False) == RequestPhase(False, 2, 3)


def test_the_last_token_of_a_chunked_prompt_is_still_a_prompt() -> None:
    tracker = PhaseTracker(1, kv_skips=True)
    tracker.admit("a", 3, prompt_end=17)
    assert tracker.advance([Scheduled("a", 0, 16)]).kind is FULL
    assert tracker.advance([Scheduled("a", 16, 1)]).kind is FULL
    assert tracker.advance([Scheduled("a", 17, 1)]).kind is LORA


def test_lora_steps_leave_holes_and_full_steps_fill_the_next_slot() -> None:
    tracker = PhaseTracker(1, kv_skips=True)
    tracker.admit("a", 2, prompt_end=10)
    tracker.advance([Scheduled("a", 0, 10)])
    lens = [tracker.advance([Scheduled("a", 10 + n, 1)]).rows["a"].cache_len for n in range(7)]
    assert lens == [10, 10, 10, 11, 11, 11, 12]
    assert tracker.holes("a") == 5
    assert tracker.totals.kv_slots_written == 12
    assert tracker.totals.kv_slots_skipped == 5


def test_with_kv_write_nothing_is_skipped() -> None:
    tracker = PhaseTracker(1, kv_skips=False)
    tracker.admit("a", 3, prompt_end=4)
    lone_request(tracker, 4, 9)
    assert tracker.holes("a") == 0
    assert tracker.totals.kv_slots_written == 12 and tracker.totals.kv_slots_skipped == 0


def test_a_released_request_starts_afresh_and_its_slot_is_reused() -> None:
    tracker = PhaseTracker(1, kv_skips=True)
    tracker.admit("a", 3, prompt_end=4)
    lone_request(tracker, 4, 3)
    tracker.release("a")
    tracker.release("unknown")
    assert "a" not in tracker and tracker.holes("a") == 0
    tracker.admit("a", 3, prompt_end=6)
    plan = tracker.advance([Scheduled("a", 0, 6)])
    assert plan.rows["a"] == Row(slot=0, cache_len=0, num_tokens=6)


def test_slots_point_at_the_last_row_of_each_request() -> None:
    state = StepState(1, 4, 16, 8, torch.float32, torch.device("cpu"))
    rows = {"a": Row(2, 0, 3), "b": Row(0, 7, 1), "c": Row(1, 0, 2)}
    state.begin(StepPlan(FULL, rows), lambda: ["b", "a", "c"])
    assert [row.slot for row in state.rows()] == [0, 2, 1]
    assert state.slots[:8].tolist() == [0, -1, -1, 2, -1, 1, -1, -1]
    state.end()
    state.begin(StepPlan(LORA, {"c": Row(1, 2, 1)}), lambda: ["c"])
    state.rows()
    assert state.slots.tolist() == [1] + 15 * [-1]  # nothing of the step before is left
    state.end()
    assert state.kind is FULL and not state.in_step
    assert state.rows() == () and state.slots.eq(-1).all()


def test_a_step_is_counted_as_the_kind_that_ran() -> None:
    state = StepState(1, 4, 16, 8, torch.float32, torch.device("cpu"))
    state.rehearse(LORA)
    state.ran(LORA)
    assert state.kind is LORA and state.counts == {FULL: 0, LORA: 0}
    state.begin(StepPlan(LORA, {"a": Row(0, 2, 1)}), lambda: ["a"])
    state.ran(LORA)
    assert state.counts == {FULL: 0, LORA: 1}
    with pytest.raises(RuntimeError, match="a lora step was run as a full step"):
        state.ran(FULL)


def test_number_of_drop_layers_counts_eligible_layers_only() -> None:
    assert eligible_layers(30) == list(range(3, 29))
    assert [num_drop_layers(r, 30) for r in (0, 0.25, 0.5, 1)] == [0, 7, 13, 26]
    assert [num_drop_layers(r, 32) for r in (0.25, 0.5, 0.75)] == [7, 14, 21]
    assert num_drop_layers(1.0, 4) == 0


def test_named_choices() -> None:
    assert choose_layers("contiguous", 4, range(3, 11)) == [5, 6, 7, 8]
    assert choose_layers("uniform", 4, range(3, 11)) == [4, 6, 8, 10]
    assert choose_layers("uniform", 8, range(3, 11)) == list(range(3, 11))
    assert choose_layers("uniform", 0, range(3, 11)) == []
    with pytest.raises(ValueError, match="unknown choice"):
        choose_layers("best", 2, range(3, 11))


def test_ideal_speed_is_equation_10_without_a_rest() -> None:
    rho_of_all = 14 / 32
    expected = 4 / (4 - rho_of_all * 3)
    assert ideal_speed([1.0] * 32, list(range(9, 23)), 3, 0.0) == pytest.approx(expected)
    assert ideal_speed([1.0] * 32, list(range(9, 23)), 3, 8.0) < expected
    assert ideal_speed([1.0] * 32, [5], 0, 1.0) == 1.0


def test_an_attention_costs_what_it_reads() -> None:
    """Two layers, of width 4, with 2 heads and 1 KV head of size 2, and an MLP of width 3."""
    shape = dict(hidden_size=4, intermediate_size=3, num_attention_heads=2, num_key_value_heads=1)
    reads = LayerReads.of(SimpleNamespace(**shape))
    assert reads == LayerReads.of(SimpleNamespace(**shape, head_dim=2))
    assert reads == LayerReads(attention=16 + 8 + 8 + 16, mlp=36, token=4)
    without = {name: shape[name] for name in shape if name != "num_key_value_heads"}
    assert LayerReads.of(SimpleNamespace(**without)).token == 2 * shape["hidden_size"]
    assert reads.share() == pytest.approx(48 / 84)
    assert reads.share(context=16) == pytest.approx((48 + 64) / (84 + 64))
    sites = AdapterSites.of([1], "attn", "update", 4, 1)
    full, lora = 2 * 148, 148 + 36
    expected = 4 * full / (3 * lora + full)
    assert layers_only_speed(2, sites, 3, reads, context=16) == pytest.approx(expected)
    assert ideal_speed([84.0, 84.0], [], 1, 4.0, [0], 0.25) == pytest.approx(2 * 172 / (172 + 151))


def test_kv_saving_is_equation_15() -> None:
    assert kv_saving(32, 14, 3) == pytest.approx((1 - 4 / 32) * 0.5 * (1 - 1 / 4))


@pytest.mark.parametrize("num_layers", [16, 22, 24, 28, 30, 32, 40, 48, 80])
@pytest.mark.parametrize("rho", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("unit", [16, 32])
def test_blocks_of_both_groups_weigh_the_same(num_layers: int, rho: float, unit: int) -> None:
    drop = num_drop_layers(rho, num_layers)
    sizes = packed_block_sizes(num_layers - drop, drop, unit)
    assert packed_saving(num_layers - drop, drop, *sizes) >= MIN_SAVING
    assert packing_waste(num_layers - drop, drop, *sizes) < 0.2
    assert all(size % unit == 0 for size in sizes)


@pytest.mark.parametrize(("num_layers", "drop"), [(22, 9), (32, 14), (32, 21), (80, 38)])
@pytest.mark.parametrize(("unit", "stock"), [(16, 16), (32, 128)])
def test_a_short_request_holds_hardly_more_than_in_stock_blocks(
    num_layers: int, drop: int, unit: int, stock: int
) -> None:
    """32 + 64 tokens: coarse blocks once took twice the memory of stock vLLM's.

    Not at every depth: with 22 drop layers of 48 it holds 1.4 times as much (docs/decisions.md).
    """
    on, short = packed_block_sizes(num_layers - drop, drop, unit)
    block = max((num_layers - drop) * on, drop * short)
    held = block * (math.ceil(96 / on) + math.ceil((32 + 16) / short))
    assert held <= 1.15 * num_layers * stock * math.ceil(96 / stock)
