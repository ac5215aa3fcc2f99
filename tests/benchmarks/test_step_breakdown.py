"""Parts of a step: what spans become, and that they are found in an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import step_breakdown
from step_breakdown import Span


def test_parts_of_a_step_are_its_time_without_what_they_contain() -> None:
    """A step of 10 ms: 2 of scheduler, 6 of layers of which 1 fills states; one call outside."""
    spans = [
        Span("scheduler", 0.5, 0.9),
        Span(step_breakdown.STEP, 1.0, 11.0),
        Span("scheduler", 1.0, 3.0),
        Span(step_breakdown.DROP, 4.0, 10.0),
        Span(step_breakdown.SAVING, 9.0, 10.0),
        Span(step_breakdown.STEP, 11.0, 12.0),
    ]
    first, second = step_breakdown.own_times(spans)
    assert {part: t for part, t in first.items() if t} == {
        "scheduler": 2.0,
        step_breakdown.DROP: 5.0,
        step_breakdown.SAVING: 1.0,
        step_breakdown.STEP: 2.0,
    }
    assert sum(second.values()) == 1.0
    beyond = step_breakdown.gap(second, first)  # what D costs is all gap, other parts by difference
    assert beyond["scheduler"] == -2.0 and beyond[step_breakdown.DROP] == 0.0


@pytest.mark.engine
def test_a_profiled_step_has_the_parts_of_its_kind(models: dict[str, Path]) -> None:
    """The parts are found by the names of our classes and of vLLM's, which may change."""
    given = step_breakdown.parse(["--tokens", "25", "--prompt", "8"])
    settings = {"untrained": True, "drop_layers": [3, 4], "k": 3}
    found, _ = step_breakdown.profile(models["llama"], settings, given)
    nowhere = {
        kind: {p for p in step_breakdown.PARTS if not found[kind][p]} for kind in ("full", "lora")
    }
    assert nowhere == {"full": set(), "lora": {step_breakdown.SAVING}}
