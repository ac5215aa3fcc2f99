"""The file of generated text, and a side file with its settings and progress."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_drop_vllm.atomic_files import append_line, replacing


@dataclass(frozen=True)
class Generated:
    """What a file holds after a run.

    Attributes:
        tokens: tokens of the replies, or of the continuations
        attempts: number of documents begun, including unusable ones
        left_out: number of turns that could not be used, by reason
    """

    path: Path
    documents: int
    tokens: int
    attempts: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return (
            f"{self.path}: {self.documents} documents, {self.tokens} tokens by the model, from "
            f"{self.attempts} attempts; turns left out: {reasons or 'none'}"
        )


class GeneratedFile:
    """Documents as JSON lines; `NAME.meta.json` beside the file holds their settings.

    `add` appends a batch, then replaces the side file. On opening, lines that the side file does
    not count are cut off. A kill therefore loses the current batch only.

    Attributes:
        known: keys of the documents in the file, to tell repetitions by
        documents, tokens: in the file
        attempts: so many are done
        left_out: turns that could not be used, by reason

    Raises:
        ValueError: the file was made with other settings, or not by `lora-drop generate`.
    """

    def __init__(self, path: Path, made_by: dict[str, Any]) -> None:
        self.path, self._made_by = path, json.loads(json.dumps(made_by))
        self.known: set[str] = set()
        self.documents = self.tokens = self.attempts = 0
        self.left_out: Counter[str] = Counter()
        if _side(path).exists() or (path.exists() and path.stat().st_size):
            self._go_on()

    def add(
        self,
        records: Sequence[dict[str, Any]],
        attempts: int,
        left_out: Counter[str],
        engine: dict[str, Any],
    ) -> None:
        """Appends the documents of a batch.

        Args:
            attempts: number of attempts in the batch
            left_out: number of unusable turns in the batch, by reason
            engine: versions, device and dtype
        """
        if records:
            append_line(self.path, "\n".join(map(json.dumps, records)))
        for record in records:
            self._count(record)
        self.attempts += attempts
        self.left_out += left_out
        state = {"made_by": self._made_by, "engine": engine, "attempts": self.attempts}
        state |= {"documents": self.documents, "tokens": self.tokens, "left_out": self.left_out}
        with replacing(_side(self.path)) as scratch:
            scratch.write_text(json.dumps(state, indent=2) + "\n")

    def report(self) -> Generated:
        """The contents of the file, in numbers."""
        left_out = dict(self.left_out.most_common())
        return Generated(self.path, self.documents, self.tokens, self.attempts, left_out)

    def _count(self, record: dict[str, Any]) -> None:
        self.documents += 1
        self.tokens += record["tokens"]
        self.known.add(key(record))

    def _go_on(self) -> None:
        try:
            state = json.loads(_side(self.path).read_text())
            made_by, documents = state["made_by"], state["documents"]
            self.attempts = int(state["attempts"])
            self.left_out.update(state["left_out"])
            with self.path.open("rb") as file:
                lines = list(islice(file, documents))
            for line in lines:
                self._count(json.loads(line))
            if self.documents < documents:
                raise ValueError(f"{documents} documents expected, {self.documents} found")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--out {self.path}: not what `lora-drop generate` writes ({error}); choose "
                "another file"
            ) from error
        for name, value in self._made_by.items():
            if (other := made_by.get(name)) != value:
                raise ValueError(
                    f"--out {self.path}: made with {name} {other!r}, not {value!r}; resume it with "
                    "that value, or choose another file"
                )
        os.truncate(self.path, sum(len(line) for line in lines))


def documents_in(path: Path) -> int:
    """Number of documents that a file holds for certain; 0 if the file does not exist."""
    try:
        return int(json.loads(_side(path).read_text())["documents"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Locks a file against other writers; waits until they release it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _side(path: Path) -> Path:
    return path.with_name(f"{path.name}.meta.json")


def normalized(turn: str) -> str:
    """A turn in the form that repetitions are compared in: lower case, single spaces."""
    return " ".join(turn.casefold().split())


def user_turns(record: dict[str, Any]) -> list[str]:
    """Normalized user turns of a conversation; empty for a text."""
    messages = record.get("messages", ())
    return [normalized(m["content"]) for m in messages if m["role"] == "user"]


def key(record: dict[str, Any]) -> str:
    """What tells a document from others: its first user turn, its prompt, or the whole text."""
    if "messages" in record:
        return user_turns(record)[0]
    return normalized(record["prompt" if "prompt" in record else "text"])


def read_user_turns(path: Path) -> Iterator[str]:
    """Normalized user turns of all conversations in a file, for `--exclude`.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        for line in filter(str.strip, path.read_text().split("\n")):
            yield from user_turns(json.loads(line))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--exclude {path}: expected JSON lines of conversations ({error})"
        ) from error
