"""Answers of a server, token by token: text, kind of step, time since the token before."""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# of the body, what the OpenAI client does not know
EXTENSIONS = ("return_token_ids", "vllm_xargs")
OLD_SERVER = "the server does not tell the kinds of its steps; install this lora_drop_vllm there"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its next answer.

    Attributes:
        messages: `role` and `content` of each turn so far
        k: LoRA steps between two full steps; 0 asks the base model
        plain: continue the text of all turns, without the model's chat template
    """

    messages: Sequence[Mapping[str, str]]
    k: int
    sampling: Sampling = field(default_factory=Sampling)
    plain: bool = False

    @property
    def route(self) -> str:
        """The path of the request, after `/v1`."""
        return "completions" if self.plain else "chat/completions"

    def body(self, model: str) -> dict[str, Any]:
        """The JSON that is sent, which is also what "copy as curl" shows."""
        asked: dict[str, Any]
        if self.plain:
            asked = {"prompt": "".join(message["content"] for message in self.messages)}
        else:
            asked = {"messages": [dict(message) for message in self.messages]}
        return {
            "model": model,
            **asked,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            "seed": self.sampling.seed,
            "stream": True,
            "return_token_ids": True,
            "vllm_xargs": {"lora_drop_k": self.k, "lora_drop_steps": 1},
        }


@dataclass(frozen=True)
class Piece:
    """What one chunk of a stream brought: mostly one token, more when the reader was slow.

    Attributes:
        ids: token ids; a token that is part of a character has no text of its own yet
        kinds: a letter a token, F for a full step and L for a LoRA step
        ms: milliseconds since the piece before; None for the first
        reason: why the answer ended, with its last piece
    """

    text: str
    ids: tuple[int, ...]
    kinds: str
    ms: float | None
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """An answer so far in numbers.

    Attributes:
        per_second: tokens a second after the first; None before the second
        p50_ms, p95_ms: between tokens
        kv_written, kv_stock: KV slots of a drop layer that hold the prompt and the answer, and
            those that the stock model fills with them; the last token has none yet
    """

    tokens: int
    full: int
    lora: int
    per_second: float | None
    p50_ms: float | None
    p95_ms: float | None
    kv_written: int
    kv_stock: int


@dataclass
class Answer:
    """An answer as it grows.

    Attributes:
        kv_skips: whether LoRA steps write no KV slot in the drop layers
        prompt_ids: the prompt in tokens, known from the first piece on
    """

    kv_skips: bool
    prompt_ids: tuple[int, ...] = ()
    pieces: list[Piece] = field(default_factory=list)
    full: int = 0
    lora: int = 0
    _gaps: list[float] = field(default_factory=list)  # milliseconds per token, sorted
    _total_ms: float = 0.0

    @property
    def ids(self) -> tuple[int, ...]:
        """All its tokens."""
        return tuple(i for piece in self.pieces for i in piece.ids)

    def add(self, piece: Piece) -> None:
        """Take in what came."""
        self.pieces.append(piece)
        self.lora += piece.kinds.count("L")
        self.full += piece.kinds.count("F")
        if piece.ms is not None and piece.ids:
            self._total_ms += piece.ms
            for _ in piece.ids:  # tokens that came together share their time
                insort(self._gaps, piece.ms / len(piece.ids))

    def summary(self) -> Summary:
        """The answer in numbers."""
        tokens = self.full + self.lora
        # a token's slot is written by the step that reads it, which also samples the next one
        stock = len(self.prompt_ids) + max(tokens - 1, 0)
        return Summary(
            tokens=tokens,
            full=self.full,
            lora=self.lora,
            per_second=1000 * len(self._gaps) / self._total_ms if self._total_ms else None,
            p50_ms=_percentile(self._gaps, 50),
            p95_ms=_percentile(self._gaps, 95),
            kv_written=stock - self.lora if self.kv_skips else stock,
            kv_stock=stock,
        )


async def stream(
    client: Any, model: str, question: Question, answer: Answer
) -> AsyncIterator[Piece]:
    """Pieces of the answer as they come, each already taken in by `answer`.

    Args:
        client: an asynchronous OpenAI client of the server
        model: what the server calls it

    Raises:
        openai.APIError, ConnectionError: the server refuses, or is gone.
        RuntimeError: it does not tell the kinds of its steps.
    """
    body = question.body(model)
    extra = {name: body.pop(name) for name in EXTENSIONS}
    ask = client.completions if question.plain else client.chat.completions
    before = None
    async with await ask.create(**body, extra_body=extra) as chunks:
        async for chunk in chunks:
            for choice in chunk.choices:
                told = choice.model_extra
                prompt_ids = chunk.model_extra.get("prompt_token_ids")
                if prompt_ids := prompt_ids or told.get("prompt_token_ids"):
                    answer.prompt_ids = tuple(prompt_ids)
                ids = tuple(told.get("token_ids") or ())
                text = (choice.text if question.plain else choice.delta.content) or ""
                if not (ids or text or choice.finish_reason):
                    continue  # the chunk that names the role
                kinds = told.get("lora_drop_steps", "")
                if len(kinds) != len(ids):
                    raise RuntimeError(OLD_SERVER)
                now = time.perf_counter()
                ms = None if before is None else 1000 * (now - before)
                before = now
                piece = Piece(text, ids, kinds, ms, choice.finish_reason)
                answer.add(piece)
                yield piece
    if not answer.pieces or answer.pieces[-1].reason is None:
        raise ConnectionError("the stream ended before the answer did")


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent of the values do not exceed."""
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else None
