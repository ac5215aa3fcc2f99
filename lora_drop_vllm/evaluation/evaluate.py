"""`lora-drop evaluate`: quality under the served schedule beside the base model's.

Text and tasks with given answers are teacher-forced: the context is the prompt, and what follows
runs in cycles of k LoRA steps and a full step, as it would be decoded. Tasks that the model answers
freely (GSM8K, HumanEval) and chat prompts are decoded by a server.
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

from lora_drop_vllm.atomic_files import replacing
from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import on_sequences, perplexity
from lora_drop_vllm.evaluation.inputs import Inputs, chat_errors, check_asked, check_source
from lora_drop_vllm.evaluation.report import (
    PROMPT,
    WINDOW,
    ChatResult,
    EvaluateResult,
    ServedDecoding,
    TextResult,
)
from lora_drop_vllm.evaluation.rollouts import run_rollouts
from lora_drop_vllm.evaluation.scoring import run_task
from lora_drop_vllm.evaluation.served_answers import Decoding, run_decoded
from lora_drop_vllm.evaluation.significance import MeanLoss
from lora_drop_vllm.evaluation.tasks import task_path
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.model_card import CARD, FIGURES, write_card
from lora_drop_vllm.server_process import Endpoint, Server
from lora_drop_vllm.training.chat import Reply
from lora_drop_vllm.training.corpus import Corpus

DEFAULT_DECODING = Decoding()


def evaluate(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    text: str | Path | None = None,
    chat: str | Path | None = None,
    rollouts: str | Path | None = None,
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
        rollouts: file of chat prompts that a server answers
        tasks: `.jsonl` files, or names of such files in `data`
        data: folder of the tasks that are given by name
        limit: windows of the text, replies, prompts, and questions of each task, at most
        decoding: how a server decodes prompts and the tasks without given answers
        out: JSON file of the result; also written after each decoded task

    Raises:
        ValueError: nothing to evaluate on, or input that cannot be used.
        RuntimeError: the server failed.
    """
    check_asked(text or chat or tasks, rollouts, decoding.temperature, out)
    paths = [task_path(str(name), Path(data)) for name in tasks]
    inputs = Inputs.read(text, chat, rollouts, paths, limit, decoding)
    check_source(model, adapter, decoding, inputs)
    adapter = adapter and adapter_folder(adapter)
    result = _named(model, adapter)
    if inputs.served:
        with _server(model, adapter, decoding) as server:
            result = _ask(result, server, inputs, decoding, out)
    if model and adapter and inputs.here:
        result = _score(result, str(model), Path(adapter), inputs, limit)
    try:
        _write(result, out)
    except RuntimeError:
        print(result, flush=True)  # hours of work, on a full disk
        raise
    return result


def _named(model: str | Path | None, adapter: str | Path | None) -> EvaluateResult:
    """The result before anything is measured."""
    config = read_config(Path(adapter)) if adapter else None
    return EvaluateResult(None if model is None else str(model), adapter=config)


def _ask(
    result: EvaluateResult,
    server: Endpoint,
    inputs: Inputs,
    decoding: Decoding,
    out: str | Path | None,
) -> EvaluateResult:
    """The result with the server's answers, written after each task."""
    asked = ServedDecoding(**asdict(decoding), served=server.name)
    result = replace(result, decoding=asked)
    for task in inputs.decoded:
        answers = run_decoded(server, task, decoding)
        result = replace(result, decoded=[*result.decoded, answers])
        _write(result, out)
    if inputs.prompts:
        result = replace(result, rollouts=run_rollouts(server, *inputs.prompts, decoding))
        _write(result, out)
    return result


def _write(result: EvaluateResult, out: str | Path | None) -> None:
    if out is not None:
        out, report = Path(out), result.report()
        text = json.dumps(report, indent=2) + "\n"
        if out.exists() and not out.is_file():  # /dev/stdout, a pipe
            out.write_text(text)
        else:
            with replacing(out) as scratch:
                scratch.write_text(text)
        if out.name == FIGURES and (out.parent / CARD).is_file() and result.adapter:
            write_card(out.parent, result.adapter, report=report)


def _score(
    result: EvaluateResult, model: str, adapter: Path, inputs: Inputs, limit: int | None
) -> EvaluateResult:
    """The result with what is teacher-forced in this process."""
    config = read_config(adapter)
    tensors = load_tensors(adapter, config)
    base, tokenizer = open_model(model)
    decoder = ForcedDecoder(base, Adapter(config, tensors).to(base.device))
    if inputs.text:
        result = replace(result, text=_on_text(decoder, tokenizer, *inputs.text, limit))
    if inputs.chat:
        result = replace(result, chat=_on_chat(decoder, tokenizer, *inputs.chat, limit))
    found = [run_task(decoder, tokenizer, task) for task in inputs.forced]
    mean = MeanLoss.of([task.accuracy for task in found]) if len(found) > 1 else None
    return replace(result, tasks=found, mean_loss=mean)


def _on_text(
    decoder: ForcedDecoder, tokenizer: Any, file: str, text: str, limit: int | None
) -> TextResult:
    windows = text_windows(tokenizer, text, limit)
    steps = perplexity(decoder, windows, PROMPT, decoder.adapter.config.k)
    return TextResult(file, len(windows), steps)


@contextmanager
def _server(
    model: str | Path | None, adapter: str | Path | None, decoding: Decoding
) -> Iterator[Endpoint]:
    """The server at `--url`, or a new one that serves the model with the adapter."""
    for package in ("openai",) if decoding.url else ("openai", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"GSM8K, HumanEval and --rollouts need the package {package}, because a server "
                f"decodes them; install {package}"
                + ("" if decoding.url else ", or name a server with --url")
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


def _on_chat(
    decoder: ForcedDecoder, tokenizer: Any, file: str, corpus: Corpus, limit: int | None
) -> ChatResult:
    length: int = decoder.model.config.max_position_embeddings
    with chat_errors():
        found = corpus.rendered(tokenizer, length).documents
    replies = [reply for reply in found if isinstance(reply, Reply)][:limit]
    if not replies:
        raise ValueError(
            f"--chat {file}: no replies; expected lines with `messages`, or with a "
            "`prompt` and a `completion`"
        )
    steps = on_sequences(decoder, [(r.tokens, r.prompt) for r in replies], decoder.adapter.config.k)
    return ChatResult(file, len(replies), steps)


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
