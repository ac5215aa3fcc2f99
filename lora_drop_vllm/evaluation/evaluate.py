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
from dataclasses import asdict, dataclass, replace
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
from lora_drop_vllm.evaluation.rollouts import run_rollouts
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
from lora_drop_vllm.generation.generate import read_prompts
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.model_card import CARD, FIGURES, write_card
from lora_drop_vllm.server_process import Endpoint, Server
from lora_drop_vllm.training.chat import Reply
from lora_drop_vllm.training.corpus import read_corpus

DEFAULT_DECODING = Decoding()


@dataclass(frozen=True)
class _Inputs:
    """All that is evaluated on, read before a model is opened.

    Attributes:
        text: name of the file of text, and what is in it
        chat: file of conversations
        forced: tasks with given answers
        decoded: tasks that a server answers
        prompts: name of the file of chat prompts, and what is in it
    """

    text: tuple[str, str] | None
    chat: Path | None
    forced: list[Task]
    decoded: list[DecodedTask]
    prompts: tuple[str, list[Any]] | None

    @property
    def here(self) -> bool:
        """True if something is scored in this process."""
        return bool(self.text or self.chat or self.forced)

    @property
    def served(self) -> bool:
        """True if something is decoded by a server."""
        return bool(self.decoded or self.prompts)


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
    _check_asked(text or chat or tasks, rollouts, decoding.temperature, out)
    read = [read_task(task_path(str(n), Path(data)), limit, decoding.num_fewshot) for n in tasks]
    inputs = _Inputs(
        text=(str(text), read_text(Path(text))) if text else None,
        chat=Path(chat) if chat else None,
        forced=[task for task in read if task.form is Example],
        decoded=[_decoded(task, decoding) for task in read if task.form is not Example],
        prompts=_prompts(Path(rollouts), limit) if rollouts else None,
    )
    _check_source(model, adapter, decoding.url, inputs)
    adapter = adapter and adapter_folder(adapter)
    result = _named(model, adapter)
    if inputs.served:
        with _server(model, adapter, decoding) as server:
            result = _ask(result, server, inputs, decoding, out)
    if model and adapter and inputs.here:
        result = _score(result, str(model), Path(adapter), inputs, limit)
    _write(result, out)
    return result


def _prompts(file: Path, limit: int | None) -> tuple[str, list[Any]]:
    return file.name, read_prompts(file, "--rollouts")[:limit]


def _named(model: str | Path | None, adapter: str | Path | None) -> EvaluateResult:
    """The result before anything is measured."""
    config = read_config(Path(adapter)) if adapter else None
    return EvaluateResult(None if model is None else str(model), adapter=config)


def _ask(
    result: EvaluateResult,
    server: Endpoint,
    inputs: _Inputs,
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


def _check_asked(
    other: Any, rollouts: str | Path | None, temperature: float, out: str | Path | None
) -> None:
    """Raises ValueError unless there is something to evaluate on, and each setting has a use."""
    if not (other or rollouts):
        raise ValueError(
            "nothing to evaluate on: give --text FILE, --chat FILE, --rollouts or --tasks NAME"
        )
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: expected 0 (greedy) or more")
    if temperature and not rollouts:
        raise ValueError(
            f"--temperature {temperature}: tasks are decoded greedily; leave it out, or give "
            "--rollouts"
        )
    if out is not None and not Path(out).parent.is_dir():
        raise ValueError(f"--json {out}: there is no folder {Path(out).parent}; make it first")


def _write(result: EvaluateResult, out: str | Path | None) -> None:
    if out is not None:
        out = Path(out)
        out.write_text(json.dumps(result.report(), indent=2) + "\n")
        if out.name == FIGURES and (out.parent / CARD).is_file() and result.adapter:
            write_card(out.parent, result.adapter)


def _check_source(
    model: str | Path | None, adapter: str | Path | None, url: str | None, inputs: _Inputs
) -> None:
    """Raises ValueError unless it is clear which model answers each task."""
    if url and not inputs.served:
        raise ValueError(
            f"--url {url}: nothing is decoded by a server, as GSM8K, HumanEval and --rollouts "
            "are; leave --url out"
        )
    if url and not inputs.here:
        if model or adapter:
            raise ValueError("MODEL and --adapter: the server at --url has its own; leave both out")
    elif not (model and adapter):
        raise ValueError(
            "MODEL and --adapter DIR: missing; only what a server at --url decodes does without "
            "them"
        )


def _score(
    result: EvaluateResult, model: str, adapter: Path, inputs: _Inputs, limit: int | None
) -> EvaluateResult:
    """The result with what is teacher-forced in this process."""
    config = read_config(adapter)
    tensors = load_tensors(adapter, config)
    base, tokenizer = open_model(model)
    decoder = ForcedDecoder(base, Adapter(config, tensors).to(base.device))
    if inputs.text:
        result = replace(result, text=_on_text(decoder, tokenizer, *inputs.text, limit))
    if inputs.chat:
        result = replace(result, chat=_on_chat(decoder, tokenizer, inputs.chat, limit))
    found = [run_task(decoder, tokenizer, task) for task in inputs.forced]
    mean = MeanLoss.of([task.accuracy for task in found]) if len(found) > 1 else None
    return replace(result, tasks=found, mean_loss=mean)


def _on_text(
    decoder: ForcedDecoder, tokenizer: Any, file: str, text: str, limit: int | None
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


def _on_chat(decoder: ForcedDecoder, tokenizer: Any, file: Path, limit: int | None) -> ChatResult:
    length: int = decoder.model.config.max_position_embeddings
    found = read_corpus([file]).rendered(tokenizer, length).documents
    replies = [reply for reply in found if isinstance(reply, Reply)][:limit]
    if not replies:
        raise ValueError(
            f"--chat {file}: no replies; expected lines with `messages`, or with a "
            "`prompt` and a `completion`"
        )
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
