"""Perplexity, KL and agreement with the base model on plain text, by kind of step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
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


@torch.no_grad()
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
    sums = {kind: torch.zeros(5, dtype=torch.float64) for kind in ("all", "full", "lora")}
    for part in tqdm(windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])), desc="Text"):
        schedule = Schedule.of(rows([part.shape[1]] * len(part)).to(part.device), prompt, k)
        hidden, base = decoder.hidden_and_base(part, schedule)
        for n in range(len(part)):  # the vocabulary is wide: one window's logits at a time
            measures = _measures(
                decoder.logits(hidden[n, prompt:-1]),
                decoder.logits(base[n, prompt:-1]),
                part[n, prompt + 1 :],
            )
            lora = schedule.lora[n, prompt:-1]
            for kind, own in (("all", torch.ones_like(lora)), ("full", ~lora), ("lora", lora)):
                sums[kind] += measures[own].sum(0).cpu()
    return {kind: _divergence(total) for kind, total in sums.items() if total[0] > 0}


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
