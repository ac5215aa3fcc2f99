"""`lora-drop evaluate`: quality under the served schedule beside the base model's.

Text and tasks with given answers are teacher-forced: the context is the prompt, and what follows
runs in cycles of k LoRA steps and a full step, as it would be decoded. Tasks that the model answers
freely (GSM8K, HumanEval) are decoded by a server.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import on_sequences, perplexity
from lora_drop_vllm.evaluation.gsm8k import gsm8k
from lora_drop_vllm.evaluation.human_eval import human_eval
from lora_drop_vllm.evaluation.report import (
    PROMPT,
    WINDOW,
    ChatResult,
    EvaluateResult,
    ServedDecoding,
    TextResult,
)
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
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.model_card import CARD, FIGURES, write_card
from lora_drop_vllm.server_process import Endpoint, Server
from lora_drop_vllm.training.chat import Reply
from lora_drop_vllm.training.corpus import read_corpus

DEFAULT_DECODING = Decoding()


def evaluate(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    text: str | Path | None = None,
    chat: str | Path | None = None,
    tasks: Sequence[str | Path] = (),
    data: str | Path = Path(),
    limit: int | None = None,
    decoding: Decoding = DEFAULT_DECODING,
    out: str | Path | None = None,
) -> EvaluateResult:
    """Scores an adapter beside its base model on text and tasks.

    Args:
        model: folder or cached Hugging Face name; None if a server (`decoding.url`) decodes all
        adapter: the adapter's folder, or its name on the Hugging Face Hub; None like `model`
        text: UTF-8 file for perplexity, KL and agreement
        chat: JSON lines of conversations; each reply is measured after its prompt
        tasks: `.jsonl` files, or names of such files in `data`
        data: folder of the tasks that are given by name
        limit: windows of the text, replies, and questions of each task, at most
        decoding: how a server decodes the tasks without given answers
        out: JSON file of the result; also written after each decoded task

    Raises:
        ValueError: nothing to evaluate on, or input that cannot be used.
        RuntimeError: the server failed.
    """
    _check_asked(text or chat or tasks, out)
    words = read_text(Path(text)) if text else ""
    read = [read_task(task_path(str(n), Path(data)), limit, decoding.num_fewshot) for n in tasks]
    decoded = [_decoded(task, decoding) for task in read if task.form is not Example]
    forced = [task for task in read if task.form is Example]
    _check_source(model, adapter, decoding.url, bool(text or chat or forced), bool(decoded))
    adapter = adapter and adapter_folder(adapter)
    result = _named(model, adapter)
    if decoded:
        with _server(model, adapter, decoding) as server:
            result = _ask(result, server, decoded, decoding, out)
    if model and adapter and (text or chat or forced):
        decoder, tokenizer = _open(str(model), Path(adapter))
        if text:
            result = replace(result, text=_on_text(decoder, tokenizer, words, limit, str(text)))
        if chat:
            result = replace(result, chat=_on_chat(decoder, tokenizer, Path(chat), limit))
        result = _score(result, decoder, tokenizer, forced)
    _write(result, out)
    return result


def _named(model: str | Path | None, adapter: str | Path | None) -> EvaluateResult:
    """The result before anything is measured."""
    config = read_config(Path(adapter)) if adapter else None
    return EvaluateResult(None if model is None else str(model), adapter=config)


def _ask(
    result: EvaluateResult,
    server: Endpoint,
    tasks: Sequence[DecodedTask],
    decoding: Decoding,
    out: str | Path | None,
) -> EvaluateResult:
    """The result with the server's answers, written after each task."""
    asked = ServedDecoding(**asdict(decoding), served=server.name)
    result = replace(result, decoding=asked)
    for task in tasks:
        answers = run_decoded(server, task, decoding)
        result = replace(result, decoded=[*result.decoded, answers])
        _write(result, out)
    return result


def _check_asked(what: Any, out: str | Path | None) -> None:
    if not what:
        raise ValueError("nothing to evaluate on: give --text FILE, --chat FILE or --tasks NAME")
    if out is not None and not Path(out).parent.is_dir():
        raise ValueError(f"--json {out}: there is no folder {Path(out).parent}; make it first")


def _write(result: EvaluateResult, out: str | Path | None) -> None:
    if out is not None:
        out = Path(out)
        out.write_text(json.dumps(result.report(), indent=2) + "\n")
        if out.name == FIGURES and (out.parent / CARD).is_file() and result.adapter:
            write_card(out.parent, result.adapter)


def _check_source(
    model: str | Path | None,
    adapter: str | Path | None,
    url: str | None,
    forced: bool,
    decoded: bool,
) -> None:
    """Raises ValueError unless it is clear which model answers each task."""
    if url and not decoded:
        raise ValueError(f"--url {url}: no task is decoded by a server; leave --url out")
    if url and not forced:
        if model or adapter:
            raise ValueError("MODEL and --adapter: the server at --url has its own; leave both out")
    elif not (model and adapter):
        raise ValueError(
            "MODEL and --adapter DIR: missing; only tasks that a server at --url decodes do "
            "without them"
        )


def _open(model: str, adapter: Path) -> tuple[ForcedDecoder, Any]:
    """The model with its adapter, and its tokenizer."""
    config = read_config(adapter)
    tensors = load_tensors(adapter, config)
    base, tokenizer = open_model(model)
    return ForcedDecoder(base, Adapter(config, tensors).to(base.device)), tokenizer


def _score(
    result: EvaluateResult, decoder: ForcedDecoder, tokenizer: Any, tasks: Sequence[Task]
) -> EvaluateResult:
    """The result with the tasks that have given answers."""
    found = [run_task(decoder, tokenizer, task) for task in tasks]
    mean = MeanLoss.of([task.accuracy for task in found]) if len(found) > 1 else None
    return replace(result, tasks=found, mean_loss=mean)


def _on_text(
    decoder: ForcedDecoder, tokenizer: Any, text: str, limit: int | None, file: str
) -> TextResult:
    windows = text_windows(tokenizer, text, limit)
    steps = perplexity(decoder, windows, PROMPT, decoder.adapter.config.k)
    return TextResult(file, len(windows), steps)


def _decoded(task: Task, decoding: Decoding) -> DecodedTask:
    if task.form is WordProblem:
        return gsm8k(task, decoding.num_fewshot)
    return human_eval(task, decoding.run_code)


@contextmanager
def _server(
    model: str | Path | None, adapter: str | Path | None, decoding: Decoding
) -> Iterator[Endpoint]:
    """The server at `--url`, or a new one that serves the model with the adapter."""
    for package in ("openai",) if decoding.url else ("openai", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"GSM8K and HumanEval need the package {package}, because a server decodes them; "
                f"install {package}" + ("" if decoding.url else ", or name a server with --url")
            )
    if decoding.url:
        if decoding.dtype != Decoding.dtype:
            raise ValueError(
                f"--dtype {decoding.dtype}: the server at --url has its own; leave --dtype out"
            )
        yield Endpoint.at(decoding.url)
        return
    settings = json.dumps({"lora_drop": {"adapter": str(adapter)}})
    arguments = ["--model-impl", "lora_drop", "--additional-config", settings]
    arguments += ["--dtype", decoding.dtype]
    with Server(Path(str(model)), arguments) as server:
        print(f"Server: {server.url} (log: {server.log})", file=sys.stderr, flush=True)
        yield server


def _on_chat(decoder: ForcedDecoder, tokenizer: Any, file: Path, limit: int | None) -> ChatResult:
    length: int = decoder.model.config.max_position_embeddings
    found = read_corpus([file]).rendered(tokenizer, length).documents
    replies = [reply for reply in found if isinstance(reply, Reply)][:limit]
    if not replies:
        raise ValueError(f"--chat {file}: no conversations; expected lines with `messages`")
    steps = on_sequences(decoder, [(r.tokens, r.prompt) for r in replies], decoder.adapter.config.k)
    return ChatResult(str(file), len(replies), steps)


def text_windows(tokenizer: Any, text: str, limit: int | None) -> Tensor:
    """First `limit` windows of a text, [N, WINDOW].

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    count = len(ids) // WINDOW
    if not count:
        raise ValueError(f"--text: {len(ids)} tokens; expected {WINDOW} or more, one window")
    return ids[: count * WINDOW].view(count, WINDOW)[:limit]
