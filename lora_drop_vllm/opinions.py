"""What the base model thinks of each token of an answer.

The answer is sent once more as part of a prompt. Prompts are full steps, so the log-probabilities
are the base model's own, whatever wrote the answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOP = 5
UNLIKELY = math.log(10)  # so much below the base model's best token, a token counts as unlikely


@dataclass(frozen=True)
class Candidate:
    """One of the tokens that the base model would rather have taken."""

    text: str
    probability: float
    chosen: bool


@dataclass(frozen=True)
class Opinion:
    """The base model's opinion of one token.

    Attributes:
        text: of the token alone; a part of a character shows as a replacement sign
        rank: 1 for its own first choice
        unlikely: less than a tenth as probable as that one
        top: its best five, the most probable first
    """

    text: str
    probability: float
    logprob: float
    rank: int
    unlikely: bool
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class Scores:
    """The base model's opinion of an answer.

    Attributes:
        opinions: one a token, as far as the server could score: all but the last token of an answer
            that fills the model's length
        agreement: share of tokens that are its own first choice
        mean_logprob: of the tokens, in nats
    """

    opinions: tuple[Opinion, ...]
    agreement: float
    mean_logprob: float
    unlikely: int


async def score(
    client: Any, model: str, prompt_ids: Sequence[int], ids: Sequence[int], max_len: int
) -> Scores:
    """Ask the base model for its opinion of an answer.

    Args:
        client: an asynchronous OpenAI client of the server
        prompt_ids, ids: tokens of the prompt and of the answer
        max_len: tokens that a prompt and an answer of one token may have together

    Raises:
        ValueError: the answer has no token that could be scored.
        openai.APIError: the server refuses, or is gone.
    """
    tokens = [*prompt_ids, *ids][: max_len - 1]
    if len(tokens) <= len(prompt_ids):
        raise ValueError("an answer without a token has nothing to score")
    answer = await client.completions.create(
        model=model,
        prompt=tokens,
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": TOP, "vllm_xargs": {"lora_drop_k": 0}},
    )
    given = answer.choices[0].model_extra["prompt_logprobs"]
    opinions = tuple(_opinion(tokens[n], given[n]) for n in range(len(prompt_ids), len(tokens)))
    return Scores(
        opinions=opinions,
        agreement=statistics.fmean(opinion.rank == 1 for opinion in opinions),
        mean_logprob=statistics.fmean(opinion.logprob for opinion in opinions),
        unlikely=sum(opinion.unlikely for opinion in opinions),
    )


def _opinion(token: int, given: Mapping[str, Mapping[str, Any]]) -> Opinion:
    """From vLLM's dict of the best tokens and the one that stands there, by token id."""
    chosen = given[str(token)]
    best = sorted(given.items(), key=lambda item: item[1]["rank"])[:TOP]
    return Opinion(
        text=chosen["decoded_token"] or "",
        probability=math.exp(chosen["logprob"]),
        logprob=chosen["logprob"],
        rank=chosen["rank"],
        unlikely=chosen["logprob"] < best[0][1]["logprob"] - UNLIKELY,
        top=tuple(
            Candidate(entry["decoded_token"] or "", math.exp(entry["logprob"]), name == str(token))
            for name, entry in best
        ),
    )
