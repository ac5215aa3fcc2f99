"""Accuracy over KL, as a table and a figure.

Scores of two choices move apart in proportion to the root of a small KL. So does the share of
questions that change sides: those whose scores lie so close. c below is that share over the root.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.quality_records import adapter

Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One task under one adapter.

    Attributes:
        steps: `served` by the adapter, or `exact`
        kl: to the base model, over the scored tokens, in nats
        changed: share of the questions that one of the two models got right and the other wrong
        loss, loss_se: accuracy that is lost, and its standard error
    """

    adapter: str
    steps: str
    task: str
    questions: int
    kl: float
    changed: float
    loss: float
    loss_se: float


def points(exact: Sequence[Record], served: Sequence[Record]) -> list[Point]:
    """The points of these records, from the lowest KL on.

    Args:
        exact: of `accuracy_over_kl.py`
        served: of `quality.py`; of their tasks, those that `exact` has too
    """
    found = [_point(r, "exact", task) for r in exact for task in r["metrics"]["exact"]]
    names = {p.task for p in found}
    tasks = [(r, task) for r in served for task in r["metrics"]["tasks"] if task["task"] in names]
    found += [_point(r, "served", task) for r, task in tasks]
    return sorted(found, key=lambda p: p.kl)


def _point(r: Record, steps: str, task: dict[str, Any]) -> Point:
    marks, n = task["accuracy"], task["examples"]
    changed = (marks["only_base"] + marks["only_this"]) / n
    loss = marks["loss"], marks["loss_se"]
    return Point(adapter(r), steps, task["task"], n, task["kl"], changed, *loss)


def slope(of: Sequence[Point], field: str = "changed") -> float:
    """c of the least squares line c·√KL through a task's points."""
    return sum(getattr(p, field) * math.sqrt(p.kl) for p in of) / sum(p.kl for p in of)


def kl_at(loss: float, of: Sequence[Point]) -> float:
    """The KL at which a task loses so much accuracy, by its line."""
    return (loss / slope(of, "loss")) ** 2


def accuracy_table(found: Sequence[Point], losses: Sequence[float]) -> list[str]:
    """The points, and for each task the KL at these losses of accuracy."""
    names = ("adapter", "LoRA steps", "task", "questions", "KL to base", "changed sides")
    names += ("changed sides / √KL", "loss, points")
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for p in found:
        lines.append(
            f"| {p.adapter} | {p.steps} | {p.task} | {p.questions} "
            f"| {p.kl:.3f} | {p.changed:.1%} | {p.changed / math.sqrt(p.kl):.3f} "
            f"| {100 * p.loss:.1f} ± {100 * p.loss_se:.1f} |"
        )
    heads = [f"KL at a loss of {100 * loss:.2f} points" for loss in losses]
    lines += ["", "| task, by its line | " + " | ".join(heads) + " |"]
    lines += ["|" + " --- |" * (1 + len(losses))]
    for task, of in by_task(found).items():
        lines.append(f"| {task} | " + " | ".join(f"{kl_at(x, of):.3f}" for x in losses) + " |")
    return lines


def by_task(found: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each task."""
    return {task: [p for p in found if p.task == task] for task in sorted({p.task for p in found})}


def draw_accuracy(found: Sequence[Point], path: Path) -> None:
    """Questions that change sides and accuracy lost, over the root of the KL, with the lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    sides, lost = figure.subplots(1, 2)
    for task, of in by_task(found).items():
        roots = [math.sqrt(p.kl) for p in of]
        (drawn,) = sides.plot(roots, [100 * p.changed for p in of], "o", label=task)
        color, values = drawn.get_color(), [100 * p.loss for p in of]
        lost.errorbar(roots, values, [100 * p.loss_se for p in of], fmt="o", color=color)
        ends = [0, roots[-1]]
        for axes, field in ((sides, "changed"), (lost, "loss")):
            axes.plot(ends, [100 * slope(of, field) * x for x in ends], ":", color=color)
    sides.set(ylabel="questions that change sides, %")
    lost.set(ylabel="accuracy lost, points")
    for axes in (sides, lost):
        axes.set(xlabel="√KL to the base model, over the scored tokens", xlim=0)
    sides.legend()
    figure.savefig(path, dpi=110)
