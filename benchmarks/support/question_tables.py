"""Tables of questions: choices scored under the schedule, and answers that the server decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_drop_vllm.evaluation.significance import Comparison, MeanLoss
from support.quality_records import adapter

Record = dict[str, Any]


def questions(records: Sequence[Record]) -> list[str]:
    """Accuracy by task, and the mean loss over all tasks, for each adapter that was asked."""
    names = ("adapter", "task", "questions", "scored at LoRA steps", "accuracy", "base")
    names += ("loss, points", "p", "per byte: accuracy", "base", "loss, points", "KL to base")
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for r in records:
        name, tasks = adapter(r), r["metrics"]["tasks"]
        marks = [Comparison(**task["accuracy"]) for task in tasks]
        lines += [
            f"| {name} | {task['task']} | {task['examples']} | {task['lora_share']:.0%} "
            f"| {_marks(m)} | {m.p_value:.2g} | {_per_byte(task)} | {task['kl']:.3f} |"
            for task, m in zip(tasks, marks)
        ]
        mean = MeanLoss.of(marks)
        interval = f"{100 * mean.low:.1f} to {100 * mean.high:.1f}"
        mean_loss = f"{100 * mean.loss:.1f} ({interval})"
        lines.append(f"| {name} | mean of {mean.tasks} | | | | | {mean_loss} | | | | | |")
    return lines


def _marks(m: Comparison) -> str:
    return f"{m.share:.1%} | {m.base:.1%} | {100 * m.loss:.1f} ± {100 * m.loss_se:.1f}"


def _per_byte(task: dict[str, Any]) -> str:
    """By log-probability per byte, as lm-eval's `acc_norm`; nothing for a task without choices."""
    found = task["accuracy_per_byte"]
    return _marks(Comparison(**found)) if found else "– | – | –"


def answers(records: Sequence[Record]) -> list[str]:
    """Scores of freely decoded answers, by task and measure."""
    names = ("adapter", "task", "questions", "LoRA steps", "cut off (base)", "measure", "right")
    lines = ["| " + " | ".join((*names, "base", "p")) + " |", "|" + " --- |" * 9]
    for r in records:
        s, m = r["settings"], r["metrics"]
        taken = m["lora_drop"]
        share = taken["lora_steps"] / (taken["lora_steps"] + taken["full_steps"])
        for measure, found in m["measures"].items():
            marks = Comparison(**found)
            lines.append(
                f"| {adapter(r)} | {s['task']} | {m['examples']} | {share:.0%} "
                f"| {taken['cut_off']} ({m['base']['cut_off']}) | {measure} "
                f"| {marks.share:.1%} | {marks.base:.1%} | {marks.p_value:.2g} |"
            )
    return lines
