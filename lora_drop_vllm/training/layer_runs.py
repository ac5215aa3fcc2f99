"""How far a model's distribution moves when a run of neighbouring layers drops.

The run drops with the update fitted for it, layer by layer as in `fit`, and the KL to the base
model is taken at LoRA positions. Its batches are neither fitted nor do they choose the ridge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_drop_vllm.decode.decoder import run_layer
from lora_drop_vllm.decode.divergence import kl_divergence
from lora_drop_vllm.decode.positions import take
from lora_drop_vllm.method.adapter import AdapterConfig
from lora_drop_vllm.method.layers import eligible_layers
from lora_drop_vllm.training.layerwise import fit_layer
from lora_drop_vllm.training.samples import HELD_OUT, Sample

RUNS = 8  # of a length, at most: what bounds the work
UNSEEN = 2  # the KL is measured on every eighth batch, from the third


@dataclass(frozen=True)
class Run:
    """`count` layers from `first` on; `kl` is KL(base || they dropped), the mean in nats."""

    first: int
    count: int
    kl: float

    @property
    def layers(self) -> list[int]:
        """Their numbers."""
        return list(range(self.first, self.first + self.count))


def first_layers(count: int, eligible: Sequence[int]) -> list[int]:
    """Where runs of eligible layers begin: single ones everywhere, longer ones at RUNS places.

    The places are evenly spaced, with both ends: neighbouring runs have most layers in common.
    """
    last = len(eligible) - count
    if count == 1 or last < RUNS:
        return list(eligible[: last + 1])
    return [eligible[round(n * last / (RUNS - 1))] for n in range(RUNS)]


@torch.no_grad()
def measure_runs(
    model: Any, samples: Sequence[Sample], config: AdapterConfig, counts: Iterable[int]
) -> list[Run]:
    """Every eligible layer alone, and runs of each count, for updates like the config's.

    Raises:
        ValueError: too few batches.
    """
    layers = model.model.layers
    eligible = eligible_layers(len(layers))
    wanted: dict[int, set[int]] = {i: set() for i in eligible}
    for count in {1, *counts}:
        for first in first_layers(count, eligible):
            wanted[first].add(count)
    batches = [part.batch for part in samples]
    unseen = range(len(samples))[UNSEEN::HELD_OUT]
    if not unseen:
        raise ValueError(
            f"--criterion kl: expected three rows of text or more, and there are {len(samples)}; "
            "give more text or --tokens, or lower --length"
        )

    def to_the_end(x: list[Tensor], begin: int) -> list[Tensor]:
        return [_normed_rows(model, x[n], batches[n], begin) for n in unseen]

    x = [model.model.embed_tokens(part.tokens) for part in samples]
    base = to_the_end(x, 0)
    found = []
    with tqdm(total=sum(map(max, wanted.values())), desc="Dropping", unit="layer") as progress:
        for i, layer in enumerate(layers[: eligible[-1] + 1]):
            if i not in wanted:
                x = [run_layer(layer, stream, batch) for stream, batch in zip(x, batches)]
                continue
            teacher = student = x
            for count, own in enumerate(layers[i : i + max(wanted[i])], start=1):
                _, teacher, student = fit_layer(own, teacher, student, batches, config, unseen)
                x = teacher if count == 1 else x
                if count in wanted[i]:
                    kl = _mean_divergence(model, to_the_end(student, i + count), base)
                    found.append(Run(i, count, kl))
                progress.update()
    return found


def _normed_rows(model: Any, x: Tensor, batch: Any, begin: int) -> Tensor:
    """What the head reads at the LoRA positions, out of the stream before layer `begin`."""
    for layer in model.model.layers[begin:]:
        x = run_layer(layer, x, batch)
    normed: Tensor = model.model.norm(take(x, batch.layout.lora_at))
    return normed


def _mean_divergence(model: Any, hidden: list[Tensor], base: list[Tensor]) -> float:
    total = count = 0.0
    for own, other in zip(hidden, base):
        for a, b in zip(own.split(256), other.split(256)):  # the vocabulary is wide
            log_p, base_log_p = (model.lm_head(h).float().log_softmax(-1) for h in (a, b))
            total += float(kl_divergence(log_p, base_log_p).sum())
            count += len(a)
    return total / count
