"""The same comparison in a terminal: two answers, colours for the kinds of steps, one table."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from lora_drop_vllm.opinions import Opinion, Scores, score
from lora_drop_vllm.playground.answers import Answer, Piece, Question, Sampling, stream
from lora_drop_vllm.playground.errors import FAILURES, in_plain_words
from lora_drop_vllm.playground.served import Served
from lora_drop_vllm.server_process import Endpoint

LORA = "\033[48;5;23m\033[38;5;195m"  # pale on a dark teal: readable on light and dark terminals
UNLIKELY = "\033[4m\033[38;5;209m"
RESET = "\033[0m"


@dataclass(frozen=True)
class Compared:
    """One column: an answer and the base model's opinion of it, if it has a token."""

    name: str
    answer: Answer
    scores: Scores | None


def compare(
    endpoint: Endpoint, served: Served, text: str, k: int, sampling: Sampling, out: TextIO
) -> tuple[Compared, Compared]:
    """Ask the base model, then LoRA-Drop; print both answers and a table.

    Args:
        out: where to; coloured when it is a terminal and NO_COLOR is not set

    Raises:
        RuntimeError: the server refuses the prompt, or is gone.
    """
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    try:
        return asyncio.run(_compare(endpoint, served, text, k, sampling, out, colour))
    except FAILURES as error:
        raise RuntimeError(in_plain_words(error, served.url)) from error


async def _compare(
    endpoint: Endpoint,
    served: Served,
    text: str,
    k: int,
    sampling: Sampling,
    out: TextIO,
    colour: bool,
) -> tuple[Compared, Compared]:
    columns = []
    async with endpoint.async_client() as client:
        for name, own_k in (("base model", 0), (f"LoRA-Drop, k = {k}", k)):
            out.write(f"{name}:\n")
            question = Question([{"role": "user", "content": text}], own_k, sampling)
            answer = Answer(served.kv_skips)
            async for piece in stream(client, served.name, question, answer):
                out.write(_tinted(piece, colour))
                out.flush()
            out.write("\n\n")
            scores = None
            if answer.ids:
                scores = await score(
                    client, served.name, answer.prompt_ids, answer.ids, served.max_len
                )
            columns.append(Compared(name, answer, scores))
    base, ours = columns
    if ours.scores:
        _write_unlikely(ours.answer, ours.scores.opinions, out, colour)
    _write_table((base, ours), out)
    return base, ours


def printable(text: str) -> str:
    """Text of a model without the control characters that a terminal would obey."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _tinted(piece: Piece, colour: bool) -> str:
    text = printable(piece.text)
    return f"{LORA}{text}{RESET}" if colour and "L" in piece.kinds and text else text


def _write_unlikely(answer: Answer, opinions: Sequence[Opinion], out: TextIO, colour: bool) -> None:
    """A line for each token that the base model finds unlikely, with what it would have taken."""
    kinds = "".join(piece.kinds for piece in answer.pieces)
    rows = [(n, opinion) for n, opinion in enumerate(opinions) if opinion.unlikely]
    many = "token" if len(rows) == 1 else "tokens"
    out.write(f"{len(rows)} {many} that the base model finds unlikely")
    out.write(" (less than a tenth of its first choice):\n" if rows else "\n")
    for n, opinion in rows:
        best = opinion.top[0]
        token = repr(printable(opinion.text))
        step = "LoRA" if kinds[n] == "L" else "full"
        out.write(
            f"  {n + 1:>4} {step}  {UNLIKELY + token + RESET if colour else token} "
            f"{opinion.probability:.1%}, its choice {printable(best.text)!r} "
            f"{best.probability:.1%}\n"
        )
    out.write("\n")


def _write_table(columns: tuple[Compared, Compared], out: TextIO) -> None:
    summaries = [column.answer.summary() for column in columns]
    scores = [column.scores for column in columns]

    def row(name: str, values: Sequence[Any]) -> None:
        out.write(f"{name:<34}" + "".join(f"{value:>20}" for value in values) + "\n")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    row("", [column.name for column in columns])
    row("tokens of full / LoRA steps", [f"{s.full} / {s.lora}" for s in summaries])
    row("tokens a second", [number(s.per_second, ".1f") for s in summaries])
    row("between tokens p50, ms", [number(s.p50_ms, ".1f") for s in summaries])
    row("between tokens p95, ms", [number(s.p95_ms, ".1f") for s in summaries])
    row("KV slots, each drop layer", [f"{s.kv_written} of {s.kv_stock}" for s in summaries])
    row("base model's first choice", [number(s and s.agreement, ".1%") for s in scores])
    row("base model's mean log-probability", [number(s and s.mean_logprob, ".3f") for s in scores])
