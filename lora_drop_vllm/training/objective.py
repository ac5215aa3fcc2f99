"""The training loss: cross-entropy, divergence from the base model, distance of hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Schedule, take
from lora_drop_vllm.engine.offline_generation import LOOP

DIVERGENCES = ("forward", "reverse", "js")
AT_ONCE = 128  # predictions; the vocabulary is wide, and small pieces fit the processor's cache
LEAVE = 0.1  # probability that the base model gives to leaving a loop, at least; see `Weights`
OUT = -1e4  # a logit whose probability is 0


@dataclass(frozen=True)
class Weights:
    """Weights of the three losses; each loss is a weighted mean over the predictions.

    Attributes:
        ce: next-token cross-entropy; not of answers of the adapter itself, which only the base
            model judges
        kl: the divergence of the student from the base model
        hidden: squared distance of the normed stream from the base model's, relative to the latter
        refresh: weight of a refresh's prediction in those means; a LoRA step's weighs 1
        divergence: `forward` is KL(base || student), `reverse` is KL(student || base), `js` is the
            Jensen-Shannon divergence, the mean of both models' KL to their average
        leave_loops: where an answer of the adapter itself repeats a phrase (`repeats`), the token
            that goes on with it is taken out of the base model's distribution if the others have a
            probability of `LEAVE` or more, and the divergence weighs so much there; 0: never
    """

    ce: float = 1.0
    kl: float = 1.0
    hidden: float = 0.0
    refresh: float = 1.0
    divergence: str = "forward"
    leave_loops: float = 0.0


@dataclass(frozen=True)
class Losses:
    """The losses of a batch, in a form that can be averaged over batches and processes.

    Attributes:
        values: [8] fp64  ce, KL(base || student), hidden, the trained divergence; then the sum of
            KL and the number of predictions, first for LoRA steps, then for refreshes
    """

    values: Tensor

    def named(self, weights: Weights) -> dict[str, float]:
        """The log's entry: the total, its parts, and the mean KL by kind of step."""
        ce, kl, hidden, divergence, *kinds = self.values.tolist()
        total = weights.ce * ce + weights.kl * divergence + weights.hidden * hidden
        entry = {"loss": total, "ce": ce, "kl": kl, "hidden": hidden}
        if weights.divergence != "forward":
            entry[weights.divergence] = divergence
        for name, found, count in zip(("kl_lora", "kl_refresh"), kinds[::2], kinds[1::2]):
            if count:
                entry[name] = found / count
        return entry


def predicting(schedule: Schedule) -> Tensor:
    """Flat positions that count, [R]: LoRA steps and later refreshes with a known next token.

    All positions before the first LoRA step are the base model's own.
    """
    same = schedule.sequence[:, 1:] == schedule.sequence[:, :-1]
    counts = schedule.lora.clone()
    counts[:, 1:] |= schedule.full[:, 1:] & schedule.lora[:, :-1] & same
    counts[:, :-1] &= same
    counts[:, -1] = False
    return counts.flatten().nonzero().squeeze(1)


def repeats(tokens: Tensor, sequence: Tensor) -> Tensor:
    """Tokens of phrases of 8 tokens that stand in a sequence three times, in a row or not.

    Args:
        tokens: [N, T]
        sequence: [N, T]  number of each token's sequence in the whole batch, negative for none

    Returns:
        [N, T] bool; the first of the times is not among them.
    """
    found = torch.zeros_like(tokens, dtype=torch.bool)
    size = LOOP["min_pattern_size"]
    if tokens.shape[1] < size:
        return found
    of = sequence.unfold(1, size, 1)  # [N, P, size]
    whole = (of == of[..., :1]).all(-1) & (of[..., 0] >= 0)
    phrases = torch.cat((of[..., :1], tokens.unfold(1, size, 1)), -1)[whole]
    _, kind, count = phrases.unique(dim=0, return_inverse=True, return_counts=True)
    at = torch.arange(len(kind), device=tokens.device)
    first = torch.full_like(count, len(kind)).scatter_reduce(0, kind, at, "amin")
    begins = torch.zeros_like(whole)
    begins[whole] = (count[kind] >= LOOP["min_count"]) & (at != first[kind])
    for offset in range(size):
        found[:, offset : offset + begins.shape[1]] |= begins
    return found


def backward(
    decoder: ForcedDecoder,
    tokens: Tensor,
    schedule: Schedule,
    own: Tensor,
    weights: Weights,
    share: float,
) -> Losses:
    """Adds `share` of a batch's gradient to the adapter's; returns the batch's losses.

    A formula computes and differentiates the logits in pieces, without autograd. Autograd runs
    through the layers once.

    Args:
        tokens: [N, T]
        own: [N] bool  rows of answers of the adapter itself
    """
    hidden, base = decoder.hidden_and_base(tokens, schedule)
    at = predicting(schedule)
    stream, other, next_token = take(hidden, at), take(base, at), tokens.flatten()[at + 1]
    lora = schedule.lora.flatten()[at]
    loop = torch.zeros_like(lora)
    given = (~own[at // tokens.shape[1]]).float()  # [R]  1 for text of the corpus
    if weights.leave_loops and own.any():
        answers = torch.full_like(tokens, -1).flatten()
        answers[at + 1] = schedule.sequence.flatten()[at + 1]
        answers = answers.view_as(tokens).masked_fill(~own[:, None], -1)
        loop = repeats(tokens, answers).flatten()[at + 1]
    weight = torch.where(lora, 1.0, weights.refresh)
    weight /= weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    gradient = torch.empty_like(stream)
    found = torch.empty(len(at), 4, dtype=torch.float64, device=at.device)
    with torch.no_grad():
        scale = other.float().square().mean()
        for piece in torch.arange(len(at), device=at.device).split(AT_ONCE):
            of = stream[piece], other[piece], next_token[piece], loop[piece], given[piece]
            made = _of_logits(decoder, *of, weights)
            apart = stream[piece].float() - other[piece].float()
            far = apart.square().mean(-1) / scale
            found[piece] = torch.stack((made.ce, made.kl, far, made.divergence), 1).double()
            slope = made.slope + weights.hidden * 2 / (scale * apart.shape[-1]) * apart
            gradient[piece] = (share * weight[piece, None] * slope).to(stream.dtype)
    if len(at):
        stream.backward(gradient)
    kl = found[:, 1]
    kinds = [x.sum().double() for x in (kl[lora], lora, kl[~lora], ~lora)]
    return Losses(torch.cat((weight.double() @ found, torch.stack(kinds))))


class _OfLogits(NamedTuple):
    """Losses of R predictions that read the logits, [R], and their gradient by `own`, [R, d].

    In `divergence`, predictions that should leave a loop have their weight already.
    """

    ce: Tensor
    kl: Tensor
    divergence: Tensor
    slope: Tensor


def _of_logits(
    decoder: ForcedDecoder,
    own: Tensor,
    other: Tensor,
    next_token: Tensor,
    loop: Tensor,
    given: Tensor,
    weights: Weights,
) -> _OfLogits:
    """Cross-entropy and divergence of R predictions; `loop` marks those that go on with a loop.

    `given`, [R], is 1 for text of the corpus, 0 for what the adapter wrote: no cross-entropy there.

    With logits z, p = softmax(z) and the base model's p', d(ce) / dz = p - onehot, and d / dz of
    KL(p' || p) = p - p'.
    """
    z, base_z = (decoder.logits(x).float() for x in (own, other))
    left = leave(base_z, next_token, loop)
    p, log_sum = _softmax(z)
    base_p, base_log_sum = _softmax(base_z)
    ce = log_sum - z.gather(1, next_token[:, None]).squeeze(1)
    apart, constant = base_z.sub_(z), log_sum - base_log_sum  # their sum: log of base_p / p
    kl = torch.linalg.vecdot(base_p, apart) + constant
    if weights.divergence == "forward":
        divergence, slope = kl, torch.sub(p, base_p, out=base_p)
    else:
        log_ratio = apart.add_(constant[:, None])
        divergence, slope = _divergence(weights.divergence, p, base_p, log_ratio)
    weight = torch.where(left, weights.leave_loops, 1.0)
    learned = weights.ce * given[:, None]
    slope = slope.mul_(weights.kl * weight[:, None]).addcmul_(p, learned)
    slope.scatter_add_(1, next_token[:, None], -learned)
    gradient = decoder.logits_transposed(slope).float()
    return _OfLogits(given * ce, kl, weight * divergence, gradient)


def leave(base_z: Tensor, next_token: Tensor, loop: Tensor) -> Tensor:
    """Takes `next_token` out of the base model's logits [R, V] where `loop` and `LEAVE` say so.

    Returns:
        [R] bool  where it did.
    """
    left = loop.clone()
    left[loop] = base_z[loop].softmax(-1).gather(1, next_token[loop, None])[:, 0] <= 1 - LEAVE
    base_z[left, next_token[left]] = OUT
    return left


def _divergence(name: str, p: Tensor, base_p: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """`reverse` or `js` of the student's p and base_p, [R], and its gradient by the logits, [R, V].

    Both are sums f(p) over the vocabulary, with d / dz = p (f'(p) - sum of p f'(p)).

    Args:
        log_ratio: log(base_p / p), [R, V]
    """
    if name == "reverse":
        slope = -log_ratio
        value = torch.linalg.vecdot(p, slope)
        return value, p * (slope - value[:, None])
    to_mean = math.log(2) - torch.nn.functional.softplus(
        log_ratio
    )  # log(p / m), m = (p + base) / 2
    from_student = torch.linalg.vecdot(p, to_mean)
    from_base = torch.linalg.vecdot(base_p, log_ratio + to_mean)
    return (from_student + from_base) / 2, p * (to_mean - from_student[:, None]) / 2


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of logits [R, V], and the logarithm of its denominator, [R]."""
    p = z.softmax(-1)
    top, at = z.max(-1, keepdim=True)  # its probability is at least 1 / V
    return p, (top - p.gather(1, at).log()).squeeze(1)
