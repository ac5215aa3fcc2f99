"""`lora-drop evaluate`: quality under the served schedule beside the base model's.

Everything is teacher-forced: what is given first is the prompt, and what follows runs in cycles of
k LoRA steps and a refresh, as it would be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.offline.closeness import perplexity
from lora_drop_vllm.offline.parallel import ParallelDecoder
from lora_drop_vllm.offline.pretrained import open_model
from lora_drop_vllm.offline.scoring import run_task
from lora_drop_vllm.offline.tasks import read_task, read_text, task_path
from lora_drop_vllm.offline.trainable import Adapter

WINDOW, PROMPT = 256, 48  # tokens of a window of text, and of its prompt


def evaluate(
    model: str,
    adapter: Path,
    *,
    text: Path | None = None,
    tasks: Sequence[str] = (),
    data: Path = Path(),
    limit: int | None = None,
    out: Path | None = None,
) -> str:
    """Text about everything that was asked for; the same as JSON in `out`.

    Args:
        model: folder, or a name in the local Hugging Face cache
        adapter: its folder
        text: UTF-8 file for perplexity
        tasks: `.jsonl` paths, or names of such files in `data`
        limit: windows of the text and questions of each task, at most

    Raises:
        ValueError: nothing to evaluate on, or input that cannot be used.
    """
    if text is None and not tasks:
        raise ValueError("nothing to evaluate on: give --text FILE, --tasks NAME,… or both")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--json {out}: there is no folder {out.parent}; make it first")
    config = read_config(adapter)
    tensors = load_tensors(adapter, config)
    words = read_text(text) if text else None
    questions = [read_task(task_path(name, data), limit) for name in tasks]
    base, tokenizer = open_model(model)
    decoder = ParallelDecoder(base, Adapter(config, tensors).to(base.device))
    report: dict[str, Any] = {"model": model, "adapter": asdict(config)}
    if words is not None:
        windows = text_windows(tokenizer, words, limit).to(base.device)
        found = perplexity(decoder, windows, PROMPT, config.k)
        report["text"] = {
            "file": str(text),
            "windows": len(windows),
            "steps": {kind: asdict(closeness) for kind, closeness in found.items()},
        }
    report["tasks"] = [asdict(run_task(decoder, tokenizer, task)) for task in questions]
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
    return _render(report)


def text_windows(tokenizer: Any, text: str, limit: int | None) -> Tensor:
    """The first `limit` windows of a text, [N, WINDOW]."""
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    count = len(ids) // WINDOW
    if not count:
        raise ValueError(f"--text: {len(ids)} tokens; a window takes {WINDOW}, give a longer text")
    return ids[: count * WINDOW].view(count, WINDOW)[:limit]


def _render(report: dict[str, Any]) -> str:
    lines = []
    if text := report.get("text"):
        lines += [
            f"{text['file']}: {text['windows']} windows of {WINDOW} tokens, prompt {PROMPT}",
            f"{'steps':<8}{'tokens':>9}{'perplexity':>12}{'base':>9}{'KL':>8}{'agreement':>11}",
        ]
        lines += [
            f"{kind:<8}{c['tokens']:>9}{c['perplexity']:>12.2f}{c['base_perplexity']:>9.2f}"
            f"{c['kl']:>8.3f}{c['agreement']:>11.3f}"
            for kind, c in text["steps"].items()
        ]
    for task in report["tasks"]:
        lines.append(
            f"{task['task']}: {task['examples']} questions, {task['skipped']} skipped, "
            f"{task['lora_share']:.0%} of the scored tokens predicted by LoRA steps"
        )
        for name in ("accuracy", "accuracy_per_byte"):
            if c := task[name]:
                lines.append(
                    f"  {name:<18}{c['share']:.3f} ± {c['share_se']:.3f}, base "
                    f"{c['base']:.3f} ± {c['base_se']:.3f}, p = {c['p_value']:.2g}"
                )
    return "\n".join(lines)
