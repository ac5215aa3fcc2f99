"""Documents cut into packed rows of tokens, and the schedules for decoding these rows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_drop_vllm.decode.positions import Schedule
from lora_drop_vllm.training.chat import Reply
from lora_drop_vllm.training.corpus import Corpus

SHORTEST = 8  # tokens of a sequence, at least
CHARACTERS = 16  # characters of a passage per token of a row; this makes a few rows


class Position(NamedTuple):
    """The start of a row: pass over the corpus, passage of that pass, token of that passage."""

    epoch: int = 0
    passage: int = 0
    token: int = 0


class Row(NamedTuple):
    """At most T tokens, in consecutive sequences.

    Attributes:
        lengths: tokens of each sequence
        prompts: prompt tokens of each sequence that is a reply; 0 if any prompt may be drawn
        own: True if the adapter in training wrote the replies
    """

    tokens: list[int]
    lengths: list[int]
    prompts: list[int]
    own: bool = False


class Rows:
    """Endless packed rows of T tokens; the seed decides the order of the passages.

    Long documents are cut into passages, so that no single one fills a whole run. The rest of a
    passage at the end of a row begins the next row as a sequence of its own. A reply is one passage
    and stays whole.

    Args:
        corpus: a corpus with rendered conversations
        turns: alternate between sources, one passage each, until they run out

    Attributes:
        length: T
        position: position of the next row; a second object that starts there gives the same rows

    Raises:
        ValueError: the corpus is shorter than one row.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        length: int,
        seed: int,
        position: Position | None = None,
        turns: bool = False,
    ) -> None:
        if length < SHORTEST:
            raise ValueError(f"--length {length}: expected {SHORTEST} tokens or more")
        size = CHARACTERS * length
        self._passages: list[Any] = []
        self._sources: list[str] = []
        for document in corpus.documents:
            pieces = [document]
            if isinstance(document, str):
                starts = range(0, len(document), size)
                pieces = [document[start : start + size] for start in starts]
            self._passages += pieces
            self._sources += [getattr(document, "source", "")] * len(pieces)
        self._tokenizer, self.length, self._seed = tokenizer, length, seed
        self._turns = turns
        self._order: tuple[int, list[int]] | None = None
        self._tokens: tuple[int, list[int]] | None = None
        found = 0
        for number in range(len(self._passages)):
            tokens = len(self._tokens_of(number))
            found += tokens if tokens >= SHORTEST else 0  # shorter sequences are left out
            if found >= length:
                break
        else:
            raise ValueError(
                f"--corpus: {found} tokens, but a row takes {length}; give more text or lower "
                "--length"
            )
        self.position = position or Position()

    def __iter__(self) -> Iterator[Row]:
        """The iterator itself."""
        return self

    def __next__(self) -> Row:
        """The next row, from `position`."""
        row = Row([], [], [])
        while (room := self.length - len(row.tokens)) >= SHORTEST:
            epoch, passage, token = self.position
            number = self._at(epoch, passage)
            tokens, prompt = self._tokens_of(number), self._prompt_of(number)
            if prompt and not token and len(tokens) > room:
                break
            piece = tokens[token : token + room]
            if len(piece) >= SHORTEST:
                row.tokens.extend(piece)
                row.lengths.append(len(piece))
                row.prompts.append(prompt)
                self.position = Position(epoch, passage, token + len(piece))
            else:
                self.leave_passage()
        return row

    def leave_passage(self) -> None:
        """Skips the rest of the current passage."""
        epoch, passage, _ = self.position
        last = passage + 1 == len(self._passages)
        self.position = Position(epoch + 1) if last else Position(epoch, passage + 1)

    def _at(self, epoch: int, passage: int) -> int:
        """The number, among all passages, of a passage of a pass."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self._seed, epoch))
            order = torch.randperm(len(self._passages), generator=generator).tolist()
            if self._turns:
                turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
                turn = {number: next(turns[self._sources[number]]) for number in order}
                order.sort(key=turn.__getitem__)  # stable: passages of one turn keep their order
            self._order = epoch, order
        return self._order[1][passage]

    def _tokens_of(self, number: int) -> Sequence[int]:
        passage = self._passages[number]
        if isinstance(passage, Reply):
            return passage.tokens
        if self._tokens is None or self._tokens[0] != number:
            self._tokens = number, self._tokenizer(passage).input_ids
        return self._tokens[1]

    def _prompt_of(self, number: int) -> int:
        passage = self._passages[number]
        return passage.prompt if isinstance(passage, Reply) else 0


def stack(rows: Sequence[Row], length: int) -> tuple[Tensor, Tensor]:
    """Tokens and sequence numbers of a batch, [N, T] each; padding has token 0 and number -1."""
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    sequence = torch.full((len(rows), length), -1)
    first = 0
    for n, row in enumerate(rows):
        tokens[n, : len(row.tokens)] = torch.tensor(row.tokens)
        numbers = torch.arange(first, first + len(row.lengths))
        sequence[n, : len(row.tokens)] = numbers.repeat_interleave(torch.tensor(row.lengths))
        first += len(row.lengths)
    return tokens, sequence


def random_schedule(
    sequence: Tensor, rows: Sequence[Row], k: int, seed: int, number: int
) -> Schedule:
    """Schedule with prompts of 1 token to half of their sequence and any phase, drawn per batch.

    Args:
        sequence: [N, T]  from `stack`
        rows: the stacked rows; replies keep their own prompts
        number: number of the batch
    """
    generator = torch.Generator().manual_seed(_mixed(seed, number))
    lengths = sequence[sequence >= 0].bincount().cpu()
    share = torch.rand(len(lengths), generator=generator)
    own = torch.tensor([prompt for row in rows for prompt in row.prompts])
    prompt = own.where(own > 0, 1 + (share * (lengths // 2)).long())
    phase = torch.randint(0, k + 1, (len(lengths),), generator=generator)
    return Schedule.of(sequence, prompt, k, phase)


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63
