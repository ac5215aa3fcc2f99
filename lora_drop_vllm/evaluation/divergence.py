"""Perplexity, KL and agreement with the base model on plain text, by kind of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lora_drop_vllm.decode.decoder import TOKENS_AT_ONCE, ForcedDecoder
from lora_drop_vllm.decode.divergence import kl_divergence
from lora_drop_vllm.decode.positions import Schedule, rows


@dataclass(frozen=True)
class Divergence:
    """Distance of a model under LoRA-Drop from its base model.

    Attributes:
        tokens: number of predicted tokens, over which the rest is taken
        perplexity, base_perplexity: exp of the mean negative log-likelihood
        kl: KL(base || this), mean in nats
        agreement: share of positions where both models have the same best token
    """

    tokens: int
    perplexity: float
    base_perplexity: float
    kl: float
    agreement: float


def perplexity(
    decoder: ForcedDecoder, windows: Tensor, prompt: int, k: int
) -> dict[str, Divergence]:
    """Divergence at `all`, `full` and `lora` steps, teacher-forced on windows of tokens [N, T].

    Only predictions after the prompt count; those of the prompt are the base model's. A kind
    without predictions is left out.

    Args:
        prompt: tokens at the start of a window that run as its prompt
        k: LoRA steps between two full steps
    """
    return on_sequences(decoder, [(window, prompt) for window in windows.tolist()], k)


@torch.no_grad()
def on_sequences(
    decoder: ForcedDecoder, sequences: Sequence[tuple[Sequence[int], int]], k: int
) -> dict[str, Divergence]:
    """`perplexity`, for sequences of any lengths, such as chat replies.

    Args:
        sequences: tokens, and how many of them are the prompt
        k: LoRA steps between two full steps
    """
    sums = {kind: torch.zeros(5, dtype=torch.float64) for kind in ("all", "full", "lora")}
    for part in tqdm(_batches(sequences), desc="Text"):
        lengths = [len(tokens) for tokens, _ in part]
        prompts = [prompt for _, prompt in part]
        device = decoder.model.device
        tokens = pad_sequence([torch.tensor(list(t)) for t, _ in part], batch_first=True).to(device)
        schedule = Schedule.of(rows(lengths).to(device), torch.tensor(prompts), k)
        hidden, base = decoder.hidden_and_base(tokens, schedule)
        # the vocabulary is wide: one sequence's logits at a time
        for n, (length, prompt) in enumerate(zip(lengths, prompts)):
            after = slice(prompt, length - 1)
            measures = _measures(
                decoder.logits(hidden[n, after]),
                decoder.logits(base[n, after]),
                tokens[n, prompt + 1 : length],
            )
            lora = schedule.lora[n, after]
            for kind, own in (("all", torch.ones_like(lora)), ("full", ~lora), ("lora", lora)):
                sums[kind] += measures[own].sum(0).cpu()
    return {kind: _divergence(total) for kind, total in sums.items() if total[0] > 0}


def _batches(
    sequences: Sequence[tuple[Sequence[int], int]],
) -> list[list[tuple[Sequence[int], int]]]:
    """Sequences of like length together, in batches of bounded size."""
    found: list[list[tuple[Sequence[int], int]]] = []
    for one in sorted(sequences, key=lambda s: -len(s[0])):  # the longest first
        if not found or (len(found[-1]) + 1) * len(found[-1][0][0]) > TOKENS_AT_ONCE:
            found.append([])
        found[-1].append(one)
    return found


def _measures(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Tensor:
    """One row per prediction: 1, both losses, KL, agreement; [R, V], [R, V], [R] to [R, 5]."""
    log_p, base_log_p = logits.float().log_softmax(-1), base_logits.float().log_softmax(-1)
    at = targets[:, None]
    columns = (
        torch.ones_like(at[:, 0]),
        -log_p.gather(1, at)[:, 0],
        -base_log_p.gather(1, at)[:, 0],
        kl_divergence(log_p, base_log_p),
        log_p.argmax(-1) == base_log_p.argmax(-1),
    )
    return torch.stack([column.double() for column in columns], dim=1)


def _divergence(total: Tensor) -> Divergence:
    loss, base_loss, kl, agreement = total[1:] / total[0]
    return Divergence(
        int(total[0]), float(loss.exp()), float(base_loss.exp()), float(kl), float(agreement)
    )
