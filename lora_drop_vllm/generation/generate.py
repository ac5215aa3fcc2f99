"""`lora-drop generate`: text from the model itself, of the kind that it serves.

A chat model writes conversations. It samples a user's turn after the empty user header of its own
chat template, then answers it (the idea of Magpie, arXiv 2406.08464), or it answers prompts from a
file, which may also hold plain prompts to continue. A model without a template continues openings.
An attempt depends only on the seed and its number. Each finished batch is appended, so a killed run
resumes after its last batch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from lora_drop_vllm.decode.pretrained import context_length, model_digest, model_name
from lora_drop_vllm.engine.offline_generation import start_engine
from lora_drop_vllm.generation.completions import Completions, Plain
from lora_drop_vllm.generation.continuations import Continuations
from lora_drop_vllm.generation.conversations import (
    USER_TURNS,
    Conversations,
    Generation,
    Run,
)
from lora_drop_vllm.generation.generated_file import (
    Generated,
    GeneratedFile,
    alone,
    read_user_turns,
)
from lora_drop_vllm.generation.turns import Message
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.json_lines import parse
from lora_drop_vllm.method.adapter import CONFIG_FILE, TENSOR_FILE, load_tensors, read_config

T = TypeVar("T")
Prompt = Plain | list[Message]
COUNT = 300  # documents by default, about a hundred thousand tokens
ADAPTER_FILES = (CONFIG_FILE, TENSOR_FILE)
BARREN = 256  # unusable attempts in a row after which the run fails


def generate(
    model: str,
    out: Path,
    settings: Generation,
    *,
    count: int | None = None,
    batch: int = 192,
    prompts: Path | None = None,
    openings: Sequence[str] = (),
    exclude: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    start: Callable[[str, int, int, Path | None], Any] = start_engine,
) -> Generated:
    """Has a model write documents to `out`, or resumes the run that is in it.

    Args:
        model: folder, or a name in the local Hugging Face cache
        out: file to write, JSON lines; `NAME.meta.json` beside it says what made them
        settings: what decides the text
        count: documents to have (300); with `prompts` no more than these, all of them by default
        batch: documents at a time; also what a kill can cost
        prompts: conversations to answer and plain prompts to continue, in place of sampled ones
        openings: texts whose beginnings a model without a chat template continues
        exclude: files of conversations; their user turns must not occur again
        adapter: folder or name; answer as the model served with it does, loops included
        start: starts the engine for a model, batch, context and adapter

    Raises:
        ValueError: settings or prompts cannot be used, or `out` was made with other settings.
        RuntimeError: the model writes nothing usable.
    """
    from transformers import AutoTokenizer

    settings.check()
    folder = _checked(adapter)
    asked = _read(prompts, "--prompts", _prompt) if prompts else None
    most = len(asked) if asked else None
    count = COUNT if count is None and most is None else count
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = _writer(tokenizer, settings, asked, openings, student=folder is not None)
    excluded = {turn for path in exclude for turn in read_user_turns(Path(path))}
    with alone(out):
        file = GeneratedFile(out, _made_by(model, settings, prompts, openings, exclude, folder))
        if not _done(file, count, most):
            context = min(writer.context, context_length(model))
            engine = start(model, batch, context, folder)
            file.add([], 0, Counter(), engine.facts)  # marks the file as ours
            _run(writer, engine, file, context, excluded, count, batch, most)
    return file.report()


def _checked(adapter: str | Path | None) -> Path | None:
    """The folder of an adapter that can be served; None for none."""
    if adapter is None:
        return None
    folder = adapter_folder(adapter)
    load_tensors(folder, read_config(folder))
    return folder


def _made_by(
    model: str,
    settings: Generation,
    prompts: Path | None,
    openings: Sequence[str],
    exclude: Sequence[str | Path],
    adapter: Path | None,
) -> dict[str, Any]:
    """All that decides the text; a file resumes with the same only."""
    return {
        "model": model_name(model),
        "digest": model_digest(model),
        **asdict(settings),
        "prompts": prompts and _digest(prompts.read_bytes()),
        "openings": len(openings) and _digest("\n".join(openings).encode()),
        **USER_TURNS,
        "exclude": [Path(path).name for path in exclude],
        "adapter": adapter
        and _digest(b"".join((adapter / name).read_bytes() for name in ADAPTER_FILES)),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _writer(
    tokenizer: Any,
    settings: Generation,
    asked: Sequence[Prompt] | None,
    openings: Sequence[str],
    student: bool,
) -> Conversations | Completions | Continuations:
    texts = [x.text if isinstance(x, Plain) else x[-1]["content"] for x in asked or ()]
    others: Conversations | Continuations = Continuations(
        tokenizer, settings, texts or openings, student
    )
    if getattr(tokenizer, "chat_template", None):
        chats = {n: x for n, x in enumerate(asked or ()) if not isinstance(x, Plain)}
        others = Conversations(tokenizer, settings, None if asked is None else chats, student)
    plain = {n: x for n, x in enumerate(asked or ()) if isinstance(x, Plain)}
    return Completions(tokenizer, settings, plain, others, student) if plain else others


def _done(file: GeneratedFile, count: int | None, most: int | None) -> bool:
    enough = count is not None and file.documents >= count
    return enough or (most is not None and file.attempts >= most)


def _run(
    writer: Any,
    engine: Any,
    file: GeneratedFile,
    context: int,
    excluded: set[str],
    count: int | None,
    batch: int,
    most: int | None,
) -> None:
    barren = 0
    total = count if most is None else min(count or most, most)
    with tqdm(total=total, initial=file.documents, desc="Generating", unit="document") as progress:
        run = Run(engine, context, file.known, excluded, progress.set_description)
        while not _done(file, count, most):
            size = batch if count is None else min(batch, 2 * (count - file.documents) + 8)
            last = min(file.attempts + size, most or file.attempts + size)
            numbers = range(file.attempts, last)
            began = time.monotonic()
            records, left_out = writer.write(numbers, run)
            if count is not None and len(records) > count - file.documents:
                records = records[: count - file.documents]
                last = records[-1]["number"] + 1
            file.add(records, last - file.attempts, left_out, engine.facts)
            speed = sum(record["tokens"] for record in records) / (time.monotonic() - began)
            progress.update(len(records))
            progress.set_postfix(tokens_per_s=f"{speed:.0f}")
            barren = 0 if records else barren + len(numbers)
            if barren >= BARREN:
                raise RuntimeError(
                    f"{file.path}: the last {barren} attempts gave nothing that can be used "
                    f"({dict(file.left_out)}); give --prompts or --corpus to begin with, or train "
                    "on other text"
                )


def read_prompts(path: Path, flag: str = "--prompts") -> list[list[Message]]:
    """Conversations that wait for a reply: JSON lines with `messages` or `prompt`, or plain lines.

    Args:
        flag: names the file in errors

    Raises:
        ValueError: the file cannot be read, or a line is not a prompt.
    """
    return _read(path, flag, _chat)


def _read(path: Path, flag: str, of_line: Callable[[dict[str, Any]], T]) -> list[T]:
    found: list[T] = []
    try:
        for number, line in enumerate(path.read_text().split("\n"), start=1):
            if line.strip():
                try:
                    raw = parse(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
                    found.append(of_line(raw if isinstance(raw, dict) else {}))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is no JSON: {error.msg}") from error
                except UnicodeError as error:
                    raise ValueError(f"line {number} is no valid Unicode") from error
                except ValueError as error:
                    raise ValueError(f"line {number} has {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: cannot be used ({error})") from error
    if not found:
        raise ValueError(f"{flag} {path}: empty; name a file with prompts in it")
    return found


def _prompt(raw: dict[str, Any]) -> Prompt:
    if isinstance(raw.get("text"), str):
        return Plain.of(raw)
    if not {"prompt", "messages"} & raw.keys():
        raise ValueError("neither a `text` nor a `prompt` nor `messages`")
    return _chat(raw)


def _is_message(raw: Any) -> bool:
    return isinstance(raw, dict) and all(isinstance(raw.get(x), str) for x in ("role", "content"))


def _chat(raw: dict[str, Any]) -> list[Message]:
    if isinstance(raw.get("prompt"), str):
        return [{"role": "user", "content": raw["prompt"]}]
    messages = raw.get("messages", [])
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError("`messages` that are no list of objects with a `role` and a `content`")
    messages = list(messages)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError("neither a `prompt` nor `messages` with a user's turn")
    return messages
