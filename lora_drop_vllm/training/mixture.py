"""Rows of several sources, mixed by share of the tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from lora_drop_vllm.training.corpus import Corpus
from lora_drop_vllm.training.rows import Position, Row, Rows


class MixedPosition(NamedTuple):
    """The position at which a row of a mixture begins.

    Attributes:
        parts: position of the next row in each source
        given: tokens taken from each source so far
    """

    parts: tuple[Position, ...]
    given: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Passes over the source that was read least often; smaller ones repeat meanwhile."""
        return min(part.epoch for part in self.parts)


class MixedRows:
    """Endless packed rows; each comes from the source that lacks most of its share.

    The shares therefore hold from the first rows on, for sources of any size. A small source
    repeats. Arguments and attributes are those of `Rows`, and

    Args:
        own: the last source holds answers of the adapter in training

    Raises:
        ValueError: a source is shorter than one row.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        length: int,
        seed: int,
        position: MixedPosition | Position | None = None,
        turns: bool = False,
        own: bool = False,
    ) -> None:
        whole = sum(share for share, _ in corpus.parts)
        self.length = length
        self._shares = [share / whole for share, _ in corpus.parts]
        self._rows = [Rows(part, tokenizer, length, seed, turns=turns) for _, part in corpus.parts]
        self._given = [0] * len(self._rows)
        self._last, self._own = 0, len(self._rows) - 1 if own else None
        if isinstance(position, MixedPosition):  # a new run passes a plain position
            self.position = position

    @property
    def position(self) -> MixedPosition:
        """Position of the next row; a second object that starts there gives the same rows."""
        return MixedPosition(tuple(rows.position for rows in self._rows), tuple(self._given))

    @position.setter
    def position(self, position: MixedPosition) -> None:
        for rows, part in zip(self._rows, position.parts):
            rows.position = part
        self._given = list(position.given)

    def __iter__(self) -> MixedRows:
        """The iterator itself."""
        return self

    def __next__(self) -> Row:
        """The next row, from `position`."""
        half = self.length / 2  # the nearest whole number of rows to each share
        late = [(given + half) / share for given, share in zip(self._given, self._shares)]
        self._last = late.index(min(late))
        row = next(self._rows[self._last])
        self._given[self._last] += len(row.tokens)
        return row._replace(own=self._last == self._own)

    def leave_passage(self) -> None:
        """Skips the rest of the passage that the last row ended in."""
        self._rows[self._last].leave_passage()


def rows_of(
    corpus: Corpus,
    tokenizer: Any,
    length: int,
    seed: int,
    position: Position | MixedPosition | None = None,
    turns: bool = False,
) -> Rows | MixedRows:
    """The rows of a corpus, mixed if its sources have shares."""
    kind: Any = MixedRows if corpus.parts else Rows
    return kind(corpus, tokenizer, length, seed, position, turns)


def read_position(raw: list[Any]) -> Position | MixedPosition:
    """The position that a JSON list holds."""
    if raw and isinstance(raw[0], list):
        parts, given = raw
        return MixedPosition(tuple(Position(*part) for part in parts), tuple(given))
    return Position(*raw)
