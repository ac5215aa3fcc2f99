"""Text to fit and train on: documents from files, and from datasets by name.

A plain text file is one document. Each line of a `.jsonl` file is one: a text in the field `text`,
a conversation in the field `messages`, or a plain `prompt` with its `completion`. Both kinds of
file may be gzipped (`.gz`). Rows of a dataset have the same fields. The optional field `source`
names the document's origin. Unusable lines are skipped and counted. The source `self` is text that
the model itself wrote. A number after a source, as in `books.txt:0.3`, is its share of the tokens.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_drop_vllm.json_lines import parse
from lora_drop_vllm.training.chat import Completed, Conversation, Reply, render
from lora_drop_vllm.training.self_corpus import SELF, self_corpus

DATASET = "datasets:"  # prefix of a dataset's name
FIELDS = (
    "a text in its field `text`, nor with a list of messages, each a role and a content, and one a "
    "reply of the assistant, in `messages`, nor with a `prompt` and a `completion`"
)


Document = str | Conversation | Completed


class Text(str):
    """A document whose line names its source."""

    source = ""


@dataclass(frozen=True)
class Corpus:
    """Documents to fit or train on.

    Attributes:
        skipped: number of lines, rows or replies that could not be used
        origin: each source's name, and the bytes of the file or rows of the dataset
        parts: the sources with their shares of the tokens, if shares are given
    """

    documents: Sequence[Document | Reply]
    skipped: int
    origin: Sequence[tuple[str, int]] = field(default=(), compare=False)
    parts: Sequence[tuple[float, Corpus]] = field(default=(), compare=False)

    def rendered(self, tokenizer: Any, length: int) -> Corpus:
        """The corpus, with each conversation replaced by its replies of up to `length` tokens.

        Raises:
            ValueError: no reply can be used, or there is no chat template.
        """
        if self.parts:
            return mixture([(share, c.rendered(tokenizer, length)) for share, c in self.parts])
        documents, reasons = render(self.documents, tokenizer, length)
        if not documents:
            raise ValueError(
                f"--corpus: no reply can be used; {reasons[0]} ({len(reasons)} such replies)"
            )
        return replace(self, documents=documents, skipped=self.skipped + len(reasons))


def remark(skipped: int) -> str:
    """The end of a report: the number of skipped lines and replies, if any."""
    return f"; {skipped} lines or replies of the corpus could not be used" if skipped else ""


def read_corpus(sources: Sequence[str | Path], model: str | None = None) -> Corpus:
    """All non-empty documents from files and from `datasets:NAME[:CONFIG[:SPLIT]]`.

    Args:
        sources: files or datasets; either all or none end in a share of the tokens
        model: the model that the source `self` is for; the first call writes its text

    Raises:
        ValueError: a source cannot be read, is binary, or holds nothing usable.
    """
    named = [_share(str(source)) for source in sources]
    shares = [share for _, share in named if share is not None]
    for name, share in named:
        if share is None and shares:
            raise ValueError(
                f"--corpus {name}: other sources have a share; give each source one, as in "
                f"{name}:0.5, or none"
            )
    corpora = [_read(name, model) for name, _ in named]
    return mixture(list(zip(shares, corpora))) if shares else _joined(corpora)


def mixture(parts: Sequence[tuple[float, Corpus]]) -> Corpus:
    """Sources with their tokens mixed by share; the shares need not add up to one."""
    whole = _joined([corpus for _, corpus in parts])
    shares = [share for share, corpus in parts for _ in corpus.origin]
    origin = [(f"{name}:{share:g}", size) for share, (name, size) in zip(shares, whole.origin)]
    return replace(whole, origin=origin, parts=tuple(parts))


def _joined(corpora: Sequence[Corpus]) -> Corpus:
    return Corpus(
        [document for corpus in corpora for document in corpus.documents],
        sum(corpus.skipped for corpus in corpora),
        [origin for corpus in corpora for origin in corpus.origin],
    )


def _share(source: str) -> tuple[str, float | None]:
    """A source and its share, which is the number after the last colon, if there is one."""
    name, _, last = source.rpartition(":")
    try:
        share = float(last)
    except ValueError:
        return source, None
    if not name or Path(source).exists():
        return source, None
    if not 0 < share < math.inf:
        raise ValueError(f"--corpus {source}: expected a share above 0 after the last colon")
    return name, share


def _read(source: str, model: str | None) -> Corpus:
    """The corpus of one source."""
    path = Path(source)
    if source == SELF and model is not None:
        path = self_corpus(model)
        found, reasons = _read_file(path)
        origin = (SELF, path.stat().st_size)
    elif source.startswith(DATASET):
        found, reasons = _read_dataset(source)
        origin = (source, len(found) + len(reasons))
    else:
        found, reasons = _read_file(path)
        origin = (path.name, path.stat().st_size)
    found = [text for text in found if not isinstance(text, str) or text.strip()]
    if not found:
        raise ValueError(
            f"--corpus {source}: "
            + (
                f"nothing can be used; {reasons[0]} ({len(reasons)} such)"
                if reasons
                else "empty; name a source with text in it"
            )
        )
    return Corpus(found, len(reasons), [origin])


def _read_file(path: Path) -> tuple[list[Document], list[str]]:
    """Documents of a file, and why its other lines were skipped."""
    jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
    texts: list[Any] = []
    reasons: list[str] = []
    try:
        for number, line in enumerate(_lines(path), start=1):
            if b"\0" in line:
                raise ValueError(
                    f"--corpus {path}: a binary file (NUL in line {number}); name a text file"
                )
            if not line.strip():
                texts += [] if jsonl else ["\n"]
                continue
            try:
                texts.append(_document(parse(line)) if jsonl else line.decode())
            except UnicodeError:
                reasons.append(f"line {number} is no valid Unicode")
            except (json.JSONDecodeError, KeyError):
                reasons.append(f"line {number} is no JSON object with {FIELDS}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--corpus {path}: cannot be read ({reason}); check the file") from error
    if not jsonl:
        texts = ["".join(texts)]
    return texts, reasons


def _read_dataset(source: str) -> tuple[list[Any], list[str]]:
    """Documents of one split of a dataset, and why its other rows were skipped."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"--corpus {source}: needs the package datasets; pip install 'lora_drop_vllm[train]'"
        ) from error
    name, config, split, *_ = [*source.removeprefix(DATASET).split(":", 2), "", ""]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # raised by datasets or by a file reader
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"--corpus {source}: cannot be read ({reason}); expected {DATASET}NAME[:CONFIG"
            "[:SPLIT]], NAME a folder or on the Hugging Face Hub"
        ) from error
    texts, reasons = [], []
    for number, row in enumerate(rows):
        try:
            texts.append(_document(row))
        except KeyError:
            reasons.append(f"row {number} ({', '.join(row)}) is none with {FIELDS}")
    return texts, reasons


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _document(raw: Any) -> Document:
    if not isinstance(raw, dict):
        raise KeyError("text")
    if isinstance(raw.get("text"), str):
        text = Text(raw["text"])
        text.source = str(raw.get("source", ""))
        return text
    if "completion" in raw and "messages" not in raw:
        return Completed.of(raw)
    return Conversation.of(raw.get("messages"))
