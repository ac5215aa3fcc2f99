"""Evaluation input: plain text, and tasks as JSON lines.

Each line of a task has one of these forms:

    {"context": str, "choices": [str, …], "gold": int}
    {"query": str, "choices": [str, …], "gold": int}      "Answer:" is put between query and choice
    {"context_options": [str, …], "continuation": str, "gold": int}
    {"context": str, "continuation": str}                 greedy decoding must produce it

The model answers these freely:

    {"question": str, "answer": str}                      GSM8K; the number follows "####"
    {"context": str, "chain_of_thought": str, "answer": str}           the same in three parts
    {"task_id": str, "prompt": str, "entry_point": str, "test": str}   HumanEval

Other keys are ignored. Lines of another form are skipped and counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from lora_drop_vllm.json_lines import parse


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        candidates: (context, continuation) of each answer
        gold: index of the right answer; None if greedy decoding must produce the only candidate
    """

    candidates: tuple[tuple[str, str], ...]
    gold: int | None


@dataclass(frozen=True)
class WordProblem:
    """A question whose answer is a number, with the reasoning that leads there."""

    question: str
    reasoning: str
    answer: Decimal


@dataclass(frozen=True)
class Program:
    """A program to complete.

    Attributes:
        prompt: beginning of the program, up to the docstring of the function to write
        entry_point: name of that function
        test: source that defines `check(candidate)`, which raises for a wrong function
    """

    name: str
    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True)
class Task:
    """The questions of one file, all of one form; `skipped` lines could not be used."""

    name: str
    examples: list[Any]
    skipped: int

    @property
    def form(self) -> type:
        """Example, WordProblem or Program."""
        return type(self.examples[0])


def read_text(path: Path) -> str:
    """Contents of a UTF-8 text file that is not empty.

    Raises:
        ValueError: the file cannot be read, is empty, or is not text.
    """
    try:
        text = _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or name a text file"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: empty; name a file that has text")
    return text


def task_path(name: str, data: Path) -> Path:
    """File of a task given as a `.jsonl` path, or by its name in the data folder."""
    return Path(name) if name.endswith(".jsonl") else data / f"{name}.jsonl"


def number(text: str) -> Decimal | None:
    """A text as a number, without `$`, commas and a final full stop; None if it is no number."""
    try:
        value = Decimal(text.strip().replace("$", "").replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def read_task(path: Path, limit: int | None = None, shots: int = 0) -> Task:
    """The first `limit` usable questions of a JSONL file, and `shots` more of word problems.

    Raises:
        ValueError: the file cannot be read, or no line of it can be used.
    """
    examples: list[Any] = []
    reasons: list[str] = []
    for row, line in enumerate(_read_bytes(path).splitlines(), start=1):
        more = shots if examples and isinstance(examples[0], WordProblem) else 0
        if limit is not None and len(examples) == limit + more:
            break
        if not line.strip():
            continue
        try:
            example = _example(parse(line))
            if examples and _form(example) != _form(examples[0]):
                raise ValueError("not of the form of the lines before; a file holds one task")
            examples.append(example)
        except UnicodeError:
            reasons.append(f"line {row} is no valid Unicode")
        except json.JSONDecodeError:
            reasons.append(f"line {row} is not JSON")
        except ValueError as error:
            reasons.append(f"line {row}: {error}")
    if not examples:
        raise ValueError(
            f"{path}: no line can be used"
            + (f"; {reasons[0]} ({len(reasons)} such lines)" if reasons else ", the file is empty")
        )
    return Task(path.stem, examples, len(reasons))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _form(example: Any) -> tuple[type, bool]:
    return type(example), isinstance(example, Example) and example.gold is None


def _example(raw: Any) -> Example | WordProblem | Program:
    keys = set(raw) if isinstance(raw, dict) else set()
    if keys >= {"context_options", "continuation", "gold"}:
        contexts, continuation = _texts(raw, "context_options"), _text(raw, "continuation")
        return _choice([(context, continuation) for context in contexts], raw["gold"])
    if keys >= {"query", "choices", "gold"}:
        context = f"{_text(raw, 'query').rstrip()}\nAnswer:"
        return _choice([(context, choice) for choice in _texts(raw, "choices")], raw["gold"])
    if keys >= {"context", "choices", "gold"}:
        context = _text(raw, "context")
        return _choice([(context, choice) for choice in _texts(raw, "choices")], raw["gold"])
    if keys >= {"context", "continuation"}:
        return Example((_pair(_text(raw, "context"), _text(raw, "continuation")),), None)
    if keys >= {"context", "chain_of_thought", "answer"}:
        return _problem(*(_text(raw, key) for key in ("context", "chain_of_thought", "answer")))
    if keys >= {"question", "answer"}:
        reasoning, _, answer = _text(raw, "answer").rpartition("####")
        return _problem(_text(raw, "question"), reasoning, answer)
    if keys >= {"task_id", "prompt", "entry_point", "test"}:
        return Program(*(_text(raw, key) for key in ("task_id", "prompt", "entry_point", "test")))
    raise ValueError(
        f"keys {sorted(keys)}: expected context or query, choices and gold; context_options, "
        "continuation and gold; context and continuation; question and answer; or task_id, prompt, "
        "entry_point and test"
    )


def _problem(question: str, reasoning: str, answer: str) -> WordProblem:
    value = number(answer)
    if value is None:
        raise ValueError(
            f"answer={answer.strip()!r}: expected a number; after reasoning, a number after ####"
        )
    return WordProblem(question.strip(), reasoning.strip(), value)


def _choice(candidates: list[tuple[str, str]], gold: Any) -> Example:
    if type(gold) is not int or not 0 <= gold < len(candidates):
        raise ValueError(
            f"gold={gold!r}: expected 0 to {len(candidates) - 1}, the index of a choice"
        )
    return Example(tuple(_pair(*candidate) for candidate in candidates), gold)


def _pair(context: str, continuation: str) -> tuple[str, str]:
    """Both, with the space between them at the start of the continuation, as tokenizers expect."""
    return context.rstrip(), f" {continuation.strip()}"


def _text(raw: dict[str, Any], key: str) -> str:
    if not isinstance(raw[key], str) or not raw[key].strip():
        raise ValueError(f"{key}={raw[key]!r}: expected a text that is not empty")
    return str(raw[key])


def _texts(raw: dict[str, Any], key: str) -> list[str]:
    if not isinstance(raw[key], list) or len(raw[key]) < 2:
        raise ValueError(f"{key}={raw[key]!r}: expected a list of two or more texts")
    return [_text({key: text}, key) for text in raw[key]]
