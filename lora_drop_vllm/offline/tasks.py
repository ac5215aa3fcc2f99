"""Evaluation input: plain text, and tasks as JSON lines.

A line of a task is one of

    {"context": str, "choices": [str, …], "gold": int}
    {"query": str, "choices": [str, …], "gold": int}      "Answer:" is put between the two
    {"context_options": [str, …], "continuation": str, "gold": int}
    {"context": str, "continuation": str}                 the model must continue like this itself

Lines that are none of these are skipped and counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        candidates: (context, continuation) of each answer
        gold: number of the right one; None where the only candidate is what the model should say
    """

    candidates: tuple[tuple[str, str], ...]
    gold: int | None


@dataclass(frozen=True)
class Task:
    """The questions of one file; `skipped` lines could not be used."""

    name: str
    examples: list[Example]
    skipped: int


def read_text(path: Path) -> str:
    """A UTF-8 text file that holds something.

    Raises:
        ValueError: there is none, it is empty, or it is not text.
    """
    try:
        text = _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or name a text file"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: empty; name a file with text in it")
    return text


def task_path(name: str, data: Path) -> Path:
    """File of a task given as a `.jsonl` path, or by its name in the data folder."""
    return Path(name) if name.endswith(".jsonl") else data / f"{name}.jsonl"


def read_task(path: Path, limit: int | None = None) -> Task:
    """The first `limit` usable questions of a JSONL file.

    Raises:
        ValueError: there is no such file, or nothing in it can be used.
    """
    examples: list[Example] = []
    reasons: list[str] = []
    for number, line in enumerate(_read_bytes(path).splitlines(), start=1):
        if len(examples) == limit:
            break
        if not line.strip():
            continue
        try:
            example = _example(json.loads(line))
            if examples and (example.gold is None) != (examples[0].gold is None):
                raise ValueError("another form than the lines before; a file holds one task")
            examples.append(example)
        except UnicodeDecodeError:
            reasons.append(f"line {number} is not UTF-8")
        except json.JSONDecodeError:
            reasons.append(f"line {number} is not JSON")
        except ValueError as error:
            reasons.append(f"line {number}: {error}")
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


def _example(raw: Any) -> Example:
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
    raise ValueError(
        f"keys {sorted(keys)}: expected context or query, choices and gold; context_options, "
        "continuation and gold; or context and continuation"
    )


def _choice(candidates: list[tuple[str, str]], gold: Any) -> Example:
    if type(gold) is not int or not 0 <= gold < len(candidates):
        raise ValueError(f"gold={gold!r}: expected 0 to {len(candidates) - 1}")
    return Example(tuple(_pair(*candidate) for candidate in candidates), gold)


def _pair(context: str, continuation: str) -> tuple[str, str]:
    """The space between the two belongs to the continuation, as tokenizers have it."""
    return context.rstrip(), f" {continuation.strip()}"


def _text(raw: dict[str, Any], key: str) -> str:
    if not isinstance(raw[key], str) or not raw[key].strip():
        raise ValueError(f"{key}={raw[key]!r}: expected some text")
    return str(raw[key])


def _texts(raw: dict[str, Any], key: str) -> list[str]:
    if not isinstance(raw[key], list) or len(raw[key]) < 2:
        raise ValueError(f"{key}={raw[key]!r}: expected a list of two texts or more")
    return [_text({key: text}, key) for text in raw[key]]
