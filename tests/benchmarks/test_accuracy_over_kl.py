"""Accuracy over KL: what a record becomes, and the line through its points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from accuracy_over_kl import decoders
from support.accuracy_figures import accuracy_table, draw_accuracy, kl_at, points, slope

from lora_drop_vllm.decode.decoder import ForcedDecoder


def task(kl: float, changed: float, loss: float, name: str = "piqa") -> dict[str, Any]:
    """A task of 100 questions, as a record has it."""
    only_base = round(100 * (changed + loss) / 2)
    only_this = round(100 * (changed - loss) / 2)
    marks = {"only_base": only_base, "only_this": only_this, "loss": loss, "loss_se": 0.01}
    return {"task": name, "examples": 100, "kl": kl, "accuracy": marks}


RECORD = {
    "settings": {"adapter": "model/a"},
    "metrics": {
        "served": [task(0.64, 0.24, 0.08), task(0.36, 0.2, 0.1, "arc")],
        "exact": [task(0.04, 0.06, 0.02)],
    },
}


def test_questions_that_change_sides_are_proportional_to_the_root_of_the_kl() -> None:
    arc = points([RECORD])[1]
    assert (arc.task, arc.adapter, arc.steps, arc.questions) == ("arc", "a", "served", 100)
    piqa = [p for p in points([RECORD]) if p.task == "piqa"]
    assert [p.kl for p in piqa] == [0.04, 0.64]
    assert [p.changed for p in piqa] == pytest.approx([0.06, 0.24])
    assert slope(piqa) == pytest.approx(0.3)
    assert slope(piqa, "loss") == pytest.approx(0.1)
    assert kl_at(0.05, piqa) == pytest.approx(0.25)


def test_the_table_has_the_points_and_the_kl_at_a_loss(tmp_path: Path) -> None:
    lines = accuracy_table(points([RECORD]), [0.05])
    assert "| a | exact | piqa | 100 | 0.040 | 6.0% | 0.300 | 2.0 ± 1.0 |" in lines
    assert "| task, by its line | KL at a loss of 5.00 points |" in lines
    assert lines[-1] == "| piqa | 0.250 |"
    pytest.importorskip("matplotlib")
    draw_accuracy(points([RECORD]), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000


@pytest.mark.parametrize(("kv", "wanted"), [("skip", ["served", "exact"]), ("write", ["served"])])
def test_only_holes_have_exact_steps(
    models: dict[str, Path], tmp_path: Path, kv: str, wanted: list[str]
) -> None:
    tiny.make_adapter(tmp_path / "a", models["llama"], drop_layers=[3, 4], k=3, kv=kv)
    found = dict(decoders(tiny.load_model(models["llama"]), tmp_path / "a"))
    assert list(found) == wanted
    assert type(found["served"]) is ForcedDecoder
