"""Multiple choice and cloze tasks under the served schedule: the context is the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lora_drop_vllm.decode.decoder import TOKENS_AT_ONCE, ForcedDecoder
from lora_drop_vllm.decode.divergence import kl_divergence
from lora_drop_vllm.decode.positions import Schedule, rows, take
from lora_drop_vllm.evaluation.significance import Comparison
from lora_drop_vllm.evaluation.tasks import Example, Task


@dataclass(frozen=True)
class TaskResult:
    """One task with given answers, under LoRA-Drop and under the base model.

    Attributes:
        task: name of its file
        examples: questions asked
        skipped: questions left out: unreadable, or too long for the model
        lora_share: share of the scored tokens that LoRA steps predict; the prompt predicts the
            first token of a continuation
        kl: mean KL(base || LoRA-Drop) over the scored tokens, in nats
        accuracy: by the continuation's log-probability; for a task without choices, by whether
            greedy decoding would produce the continuation
        accuracy_per_byte: by log-probability per byte; None for a task without choices
    """

    task: str
    examples: int
    skipped: int
    lora_share: float
    kl: float
    accuracy: Comparison
    accuracy_per_byte: Comparison | None


class Candidate(NamedTuple):
    """Tokens of a context and a continuation; the first `prompt` of them are the context."""

    tokens: list[int]
    prompt: int


def run_task(decoder: ForcedDecoder, tokenizer: Any, task: Task) -> TaskResult:
    """Scores every candidate of a task and marks the answers of both models.

    Raises:
        ValueError: no question fits the model.
    """
    longest = decoder.model.config.max_position_embeddings
    used: list[Example] = []
    candidates: list[Candidate] = []
    for example in task.examples:
        encoded = [encode(tokenizer, *pair) for pair in example.candidates]
        if all(1 <= c.prompt < len(c.tokens) <= longest for c in encoded):
            used.append(example)
            candidates += encoded
    if not used:
        raise ValueError(f"{task.name}: no question fits into the model's {longest} positions")
    scores = score(decoder, candidates, decoder.adapter.config.k, task.name)
    groups = scores.split([len(example.candidates) for example in used])
    per_byte = None
    if used[0].gold is not None:
        per_byte = _compare(used, [g[:, :2] / _bytes(e) for e, g in zip(used, groups)])
        accuracy = _compare(used, [group[:, :2] for group in groups])
    else:
        accuracy = Comparison.of(*(scores[:, column].bool().tolist() for column in (2, 3)))
    return TaskResult(
        task=task.name,
        examples=len(used),
        skipped=task.skipped + len(task.examples) - len(used),
        lora_share=float(scores[:, 4].sum() / scores[:, 5].sum()),
        kl=float(scores[:, 6].sum() / scores[:, 5].sum()),
        accuracy=accuracy,
        accuracy_per_byte=per_byte,
    )


def encode(tokenizer: Any, context: str, continuation: str) -> Candidate:
    """Tokens of both, encoded as one text and cut after the context's own number of tokens."""
    prompt = len(tokenizer(context).input_ids)
    return Candidate(tokenizer(context + continuation).input_ids, prompt)


@torch.no_grad()
def score(
    decoder: ForcedDecoder,
    candidates: Sequence[Candidate],
    k: int,
    name: str,
    *,
    base: bool = True,
) -> Tensor:
    """Scores [C, 7] of C candidates, in their order; without `base` [C, 4].

    Columns: log-probability of the continuation under LoRA-Drop and under the base model; whether
    each would decode it greedily (1 or 0); number of its tokens that LoRA steps predict; number of
    its tokens; KL(base || LoRA-Drop), summed over them. Without `base` its columns and the last
    are missing.
    """
    scores = torch.zeros(len(candidates), 7 if base else 4, dtype=torch.float64)
    with tqdm(total=len(candidates), desc=name) as progress:
        for chosen in _batches(candidates):
            scores[chosen] = _score_batch(decoder, [candidates[n] for n in chosen], k, base)
            progress.update(len(chosen))
    return scores


def _batches(candidates: Sequence[Candidate]) -> Iterator[list[int]]:
    """Indices of candidates in batches of similar length, longest first."""
    order = sorted(range(len(candidates)), key=lambda n: -len(candidates[n].tokens))
    while order:
        count = max(1, TOKENS_AT_ONCE // len(candidates[order[0]].tokens))
        yield order[:count]
        order = order[count:]


def _score_batch(decoder: ForcedDecoder, batch: list[Candidate], k: int, base: bool) -> Tensor:
    device = decoder.model.device
    sequence = rows([len(c.tokens) for c in batch])
    tokens = torch.zeros_like(sequence)
    for n, candidate in enumerate(batch):
        tokens[n, : len(candidate.tokens)] = torch.tensor(candidate.tokens)
    tokens, sequence = tokens.to(device), sequence.to(device)
    prompt = torch.tensor([c.prompt for c in batch], device=device)
    schedule = Schedule.of(sequence, prompt, k)
    predicts = schedule.position >= prompt[:, None] - 1
    predicts[:, :-1] &= sequence[:, 1:] >= 0
    predicts[:, -1] = False
    at = predicts.flatten().nonzero().squeeze(1)
    targets, owner = tokens.flatten()[at + 1], sequence.flatten()[at]
    if base:
        streams = decoder.hidden_and_base(tokens, schedule)
    else:
        streams = (decoder.hidden(tokens, schedule),)
    log_p = [decoder.logits(take(hidden, at)).float().log_softmax(-1) for hidden in streams]
    said = [p.gather(1, targets[:, None])[:, 0] for p in log_p]
    missed = [p.argmax(-1) != targets for p in log_p]
    columns = [*said, *missed, schedule.lora.flatten()[at], torch.ones_like(at)]
    columns += [kl_divergence(*log_p)] if base else []
    table = torch.stack([column.double() for column in columns], dim=1)
    scores = table.new_zeros(len(batch), table.shape[1]).index_add(0, owner, table)
    greedy = scores[:, len(said) : 2 * len(said)]
    greedy.copy_(greedy == 0)
    return scores.cpu()


def _bytes(example: Example) -> Tensor:
    lengths = [len(continuation.encode()) for _, continuation in example.candidates]
    return torch.tensor(lengths, dtype=torch.float64)[:, None]


def _compare(examples: list[Example], values: list[Tensor]) -> Comparison:
    """Marks of both models; each value is [candidates, 2], LoRA-Drop and the base model."""
    picked = torch.stack([value.argmax(0) for value in values])
    gold = torch.tensor([example.gold for example in examples])[:, None]
    right = picked == gold
    return Comparison.of(right[:, 0].tolist(), right[:, 1].tolist())
