"""`lora-drop evaluate`: quality under the served schedule beside the base model's.

Text and tasks with given answers are teacher-forced: what is given first is the prompt, and what
follows runs in cycles of k LoRA steps and a refresh, as it would be decoded. Tasks that the model
answers freely (GSM8K, HumanEval) are decoded by a server.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import perplexity
from lora_drop_vllm.evaluation.gsm8k import gsm8k
from lora_drop_vllm.evaluation.human_eval import human_eval
from lora_drop_vllm.evaluation.scoring import run_task
from lora_drop_vllm.evaluation.served_answers import DecodedTask, Decoding, run_decoded
from lora_drop_vllm.evaluation.significance import MeanLoss
from lora_drop_vllm.evaluation.tasks import (
    Example,
    Task,
    WordProblem,
    read_task,
    read_text,
    task_path,
)
from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.server_process import Endpoint, Server

WINDOW, PROMPT = 256, 48  # tokens of a window of text, and of its prompt
DEFAULT_DECODING = Decoding()


def evaluate(
    model: str | None,
    adapter: Path | None,
    *,
    text: Path | None = None,
    tasks: Sequence[str] = (),
    data: Path = Path(),
    limit: int | None = None,
    decoding: Decoding = DEFAULT_DECODING,
    out: Path | None = None,
) -> str:
    """Text about everything that was asked for; the same as JSON in `out`.

    Args:
        model: folder, or a name in the local Hugging Face cache; with `decoding.url` only needed
            for what is not decoded
        adapter: its folder; needed like `model`
        text: UTF-8 file for perplexity
        tasks: `.jsonl` paths, or names of such files in `data`
        limit: windows of the text and questions of each task, at most
        decoding: of tasks without given answers

    Raises:
        ValueError: nothing to evaluate on, or input that cannot be used.
        RuntimeError: the server failed.
    """
    if text is None and not tasks:
        raise ValueError("nothing to evaluate on: give --text FILE, --tasks NAME,… or both")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--json {out}: there is no folder {out.parent}; make it first")
    words = read_text(text) if text else None
    read = [read_task(task_path(name, data), limit, decoding.num_fewshot) for name in tasks]
    decoded = [_decoded(task, decoding) for task in read if task.form is not Example]
    forced = [task for task in read if task.form is Example]
    _check_source(model, adapter, decoding.url, bool(text or forced), bool(decoded))
    report: dict[str, Any] = {"model": model, "tasks": [], "decoded": []}
    if adapter:
        report["adapter"] = asdict(read_config(adapter))
    if decoded:
        with _server(model, adapter, decoding) as server:
            report["decoding"] = asdict(decoding) | {"served": server.name}
            for task in decoded:
                report["decoded"].append(asdict(run_decoded(server, task, decoding)))
                _write(report, out)  # hours of answers outlive a failure of the next task
    if model and adapter and (text or forced):
        report |= _force(model, adapter, text, words, forced, limit)
    _write(report, out)
    return _render(report)


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")


def _check_source(
    model: str | None, adapter: Path | None, url: str | None, forced: bool, decoded: bool
) -> None:
    """Raise ValueError unless it is clear which model each task is asked of."""
    if url and not decoded:
        raise ValueError(f"--url {url}: none of the tasks is decoded by a server; leave it out")
    if url and not forced:
        if model or adapter:
            raise ValueError("MODEL and --adapter: the server of --url has its own; leave them out")
    elif not (model and adapter):
        raise ValueError("MODEL and --adapter DIR are needed; only a server of --url has its own")


def _force(
    model: str,
    adapter: Path,
    text: Path | None,
    words: str | None,
    tasks: Sequence[Task],
    limit: int | None,
) -> dict[str, Any]:
    """The report's share of what is teacher-forced."""
    config = read_config(adapter)
    tensors = load_tensors(adapter, config)
    base, tokenizer = open_model(model)
    decoder = ForcedDecoder(base, Adapter(config, tensors).to(base.device))
    report: dict[str, Any] = {}
    if words is not None:
        windows = text_windows(tokenizer, words, limit).to(base.device)
        found = perplexity(decoder, windows, PROMPT, config.k)
        report["text"] = {
            "file": str(text),
            "windows": len(windows),
            "steps": {kind: asdict(closeness) for kind, closeness in found.items()},
        }
    results = [run_task(decoder, tokenizer, task) for task in tasks]
    report["tasks"] = [asdict(result) for result in results]
    if len(results) > 1:
        report["mean_loss"] = asdict(MeanLoss.of([result.accuracy for result in results]))
    return report


def _decoded(task: Task, decoding: Decoding) -> DecodedTask:
    if task.form is WordProblem:
        return gsm8k(task, decoding.num_fewshot)
    return human_eval(task, decoding.run_code)


@contextmanager
def _server(model: str | None, adapter: Path | None, decoding: Decoding) -> Iterator[Endpoint]:
    """The server of `--url`, or one of our own that serves the model with the adapter."""
    for package in ("openai",) if decoding.url else ("openai", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"GSM8K and HumanEval are decoded by a server, which takes {package}; install it, "
                "or evaluate where it is" + (", or name a server with --url" * (not decoding.url))
            )
    if decoding.url:
        if decoding.dtype != Decoding.dtype:
            raise ValueError(
                f"--dtype {decoding.dtype}: the server of --url has its own; leave it out"
            )
        yield Endpoint.at(decoding.url)
        return
    settings = json.dumps({"lora_drop": {"adapter": str(adapter)}})
    arguments = ["--model-impl", "lora_drop", "--additional-config", settings]
    arguments += ["--dtype", decoding.dtype]
    with Server(Path(str(model)), arguments) as server:
        print(f"Server: {server.url} (log: {server.log})", file=sys.stderr, flush=True)
        yield server


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
        measures = ("accuracy", "accuracy_per_byte")
        lines += [_measure(name, task[name]) for name in measures if task[name]]
    if mean := report.get("mean_loss"):
        loss, low, high = (100 * mean[name] for name in ("loss", "low", "high"))
        lines.append(
            f"mean of {mean['tasks']} tasks: {loss:.1f} points of accuracy lost, 95 % interval "
            f"{low:.1f} to {high:.1f}"
        )
    for task in report["decoded"]:
        lines.append(
            f"{task['task']}: {task['examples']} questions, {task['skipped']} skipped"
            + (f" ({task['refusal']})" if task["refusal"] else "")
        )
        for name, label in (("base", "base"), ("lora_drop", "LoRA-Drop")):
            taken = task[name]
            lines.append(
                f"  {label:<18}{taken['full_steps']} full and {taken['lora_steps']} LoRA steps, "
                f"{taken['tokens']} tokens, {taken['cut_off']} answers cut off"
            )
        lines += [_measure(name, found) for name, found in task["measures"].items()]
    return "\n".join(lines)


def _measure(name: str, c: dict[str, float]) -> str:
    return (
        f"  {name:<18}{c['share']:.3f} ± {c['share_se']:.3f}, base "
        f"{c['base']:.3f} ± {c['base_se']:.3f}, p = {c['p_value']:.2g}"
    )
