"""What training minimises: cross-entropy, KL to the base model, distance of the hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.divergence import kl_divergence
from lora_drop_vllm.decode.positions import Schedule, take

AT_ONCE = 512  # predictions: the vocabulary is wide


@dataclass(frozen=True)
class Weights:
    """Of the three losses, each a mean over the predictions.

    Attributes:
        ce: next-token cross-entropy
        kl: KL(base || student)
        hidden: squared distance of the normed stream from the base model's, relative to its own
    """

    ce: float = 1.0
    kl: float = 1.0
    hidden: float = 0.0


def predicting(schedule: Schedule) -> Tensor:
    """Flat positions that count: LoRA steps and their refreshes, the next token known; [R].

    What comes before the first LoRA step is the base model's.
    """
    same = schedule.sequence[:, 1:] == schedule.sequence[:, :-1]
    counts = schedule.lora.clone()
    counts[:, 1:] |= schedule.full[:, 1:] & schedule.lora[:, :-1] & same
    counts[:, :-1] &= same
    counts[:, -1] = False
    return counts.flatten().nonzero().squeeze(1)


def backward(
    decoder: ForcedDecoder, tokens: Tensor, schedule: Schedule, weights: Weights, share: float
) -> Tensor:
    """Add `share` of a batch's gradient to the adapter's; returns ce, kl and hidden, [3].

    The logits are made and differentiated in pieces; the layers once.
    """
    hidden, base = decoder.hidden_and_base(tokens, schedule)
    at = predicting(schedule)
    own, other, next_token = take(hidden, at), take(base, at), tokens.flatten()[at + 1]
    leaf = own.detach().requires_grad_()
    losses = torch.zeros(3, dtype=torch.float64, device=at.device)
    scale = other.float().square().mean()
    for piece in torch.arange(len(at), device=at.device).split(AT_ONCE):
        parts = _losses(decoder, leaf[piece], other[piece], next_token[piece], scale)
        parts = parts / max(len(at), 1)
        total = weights.ce * parts[0] + weights.kl * parts[1] + weights.hidden * parts[2]
        (share * total).backward()
        losses += parts.detach()
    if leaf.grad is not None:
        own.backward(leaf.grad)
    return losses


def _losses(
    decoder: ForcedDecoder, own: Tensor, other: Tensor, next_token: Tensor, scale: Tensor
) -> Tensor:
    """Sums over R predictions, [3]."""
    log_p = decoder.logits(own).float().log_softmax(-1)
    with torch.no_grad():
        base_log_p = decoder.logits(other).float().log_softmax(-1)
    ce = -log_p.gather(1, next_token[:, None]).sum()
    kl = kl_divergence(log_p, base_log_p).sum()
    distance = (own.float() - other.float()).square().mean(-1).sum() / scale
    return torch.stack((ce, kl, distance))
