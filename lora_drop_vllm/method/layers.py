"""Choice of the layers that drop: how many (rho), and which, by name (Sec. III-B, IV-C)."""

from __future__ import annotations

import math
from collections.abc import Sequence

HEAD_LAYERS = 3  # the first layers of a model, which always run
TAIL_LAYERS = 1  # the last one, which always runs too

CHOICES: tuple[str, ...] = ("contiguous", "uniform")


def eligible_layers(num_layers: int) -> list[int]:
    """Layers that may drop: all but the first three and the last (Eq. 13)."""
    return list(range(HEAD_LAYERS, num_layers - TAIL_LAYERS))


def num_drop_layers(rho: float, num_layers: int) -> int:
    """Number of drop layers, |D| = floor(rho * S + 1/2), with S the number of eligible layers."""
    return math.floor(rho * len(eligible_layers(num_layers)) + 0.5)


def choose_layers(choice: str, count: int, candidates: Sequence[int]) -> list[int]:
    """Picks `count` of `candidates` by name, without similarity scores.

    `uniform` spaces them evenly. `contiguous` takes the middle run (lower index on a tie): in the
    models profiled so far, neighbouring tokens are most alike there.

    Raises:
        ValueError: the choice is unknown, or there are fewer candidates.
    """
    if count > len(candidates):
        raise ValueError(f"cannot choose {count} of {len(candidates)} candidate layers")
    ordered = sorted(candidates)
    if choice == "uniform":
        return [ordered[(2 * j + 1) * len(ordered) // (2 * count)] for j in range(count)]
    if choice == "contiguous":
        first = (len(ordered) - count) // 2
        return ordered[first : first + count]
    raise ValueError(f"unknown choice {choice!r}; one of {', '.join(CHOICES)}")


def rank_layers(
    choice: str, count: int, candidates: Sequence[int], scores: Sequence[float]
) -> list[int]:
    """Picks `count` of `candidates` by the scores of all layers (Sec. IV-C); lower index on a tie.

    `contiguous` takes the run of candidates with the highest mean score. `uniform` ignores the
    scores. Any other choice is the name of a score and takes the candidates that score highest.
    """
    ordered = sorted(candidates)
    if choice == "uniform":
        return choose_layers(choice, count, candidates)
    if choice == "contiguous":
        runs = [ordered[first : first + count] for first in range(len(ordered) - count + 1)]
        return max(runs, key=lambda run: sum(scores[i] for i in run))
    return sorted(sorted(ordered, key=lambda i: -scores[i])[:count])
