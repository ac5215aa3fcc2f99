"""Accuracy over KL: what a record becomes, and the line through its points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accuracy_over_kl
import pytest
import tiny
from support.accuracy_figures import accuracy_table, draw_accuracy, kl_at, points, slope


def task(kl: float, changed: float, loss: float, name: str = "piqa") -> dict[str, Any]:
    """A task of 100 questions, as a record has it."""
    only_base = round(100 * (changed + loss) / 2)
    only_this = round(100 * (changed - loss) / 2)
    marks = {"only_base": only_base, "only_this": only_this, "loss": loss, "loss_se": 0.01}
    return {"task": name, "examples": 100, "kl": kl, "accuracy": marks}


EXACT = {"settings": {"adapter": "model/a"}, "metrics": {"exact": [task(0.04, 0.06, 0.02)]}}
SERVED = {
    "settings": {"adapter": "model/b"},
    "metrics": {"tasks": [task(0.64, 0.24, 0.08), task(0.36, 0.2, 0.1, "arc")]},
}


def test_questions_that_change_sides_are_proportional_to_the_root_of_the_kl() -> None:
    """Tasks without exact steps beside them have no line."""
    piqa = points([EXACT], [SERVED])
    assert [(p.adapter, p.steps, p.task) for p in piqa] == [
        ("a", "exact", "piqa"),
        ("b", "served", "piqa"),
    ]
    assert [p.kl for p in piqa] == [0.04, 0.64] and piqa[0].questions == 100
    assert [p.changed for p in piqa] == pytest.approx([0.06, 0.24])
    assert slope(piqa) == pytest.approx(0.3)
    assert slope(piqa, "loss") == pytest.approx(0.1)
    assert kl_at(0.05, piqa) == pytest.approx(0.25)


def test_the_table_has_the_points_and_the_kl_at_a_loss(tmp_path: Path) -> None:
    lines = accuracy_table(points([EXACT], [SERVED]), [0.05])
    assert "| a | exact | piqa | 100 | 0.040 | 6.0% | 0.300 | 2.0 ± 1.0 |" in lines
    assert "| task, by its line | KL at a loss of 5.00 points |" in lines
    assert lines[-1] == "| piqa | 0.250 |"
    pytest.importorskip("matplotlib")
    draw_accuracy(points([EXACT], [SERVED]), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000


def test_without_holes_there_is_nothing_to_measure(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    tiny.make_adapter(folder, models["llama"], drop_layers=[3, 4], k=3, kv="write")
    arguments = ["model", "--adapter", str(folder), "--tasks", "piqa.jsonl"]
    monkeypatch.setattr("sys.argv", ["accuracy_over_kl.py", *arguments])
    with pytest.raises(ValueError, match="kv write leaves no holes"):
        accuracy_over_kl.main()
