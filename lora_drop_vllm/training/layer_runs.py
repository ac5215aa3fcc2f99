"""The KL to the base model after a run of neighbouring layers drops.

Each run drops with an update fitted for it, layer by layer as in `fit`. The KL is measured at LoRA
positions. The batches that measure it serve neither the fit nor the choice of the ridge.
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
from lora_drop_vllm.method.reuse import SITES
from lora_drop_vllm.training.layerwise import fit_layer
from lora_drop_vllm.training.samples import HELD_OUT, Sample

RUNS = 8  # runs of one length, at most; this bounds the work
UNSEEN = 2  # every eighth batch, from the third, measures the KL


@dataclass(frozen=True)
class Run:
    """The `count` layers from `first` on; `kl` is the mean KL(base || dropped) in nats."""

    first: int
    count: int
    kl: float

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers."""
        return list(range(self.first, self.first + self.count))


def first_layers(count: int, eligible: Sequence[int]) -> list[int]:
    """First layers of runs: every eligible layer for a single one, else RUNS of them.

    These are evenly spaced and include both ends. Neighbouring runs share most of their layers.
    """
    last = len(eligible) - count
    if count == 1 or last < RUNS:
        return list(eligible[: last + 1])
    return [eligible[round(n * last / (RUNS - 1))] for n in range(RUNS)]


@torch.no_grad()
def measure_runs(
    model: Any, samples: Sequence[Sample], config: AdapterConfig, counts: Iterable[int]
) -> list[Run]:
    """Measures each eligible layer alone, and runs of each count, with updates like the config's.

    Raises:
        ValueError: there are too few batches.
    """
    layers, parts = model.model.layers, SITES[config.injection]
    eligible = eligible_layers(len(layers))
    wanted: dict[int, set[int]] = {i: set() for i in eligible}
    for count in {1, *counts}:
        for first in first_layers(count, eligible):
            wanted[first].add(count)
    batches = [part.batch for part in samples]
    unseen = range(len(samples))[UNSEEN::HELD_OUT]
    if not unseen:
        raise ValueError(
            f"--criterion kl: expected three or more rows of text, but there are {len(samples)}; "
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
                _, teacher, student = fit_layer(
                    own, teacher, student, batches, config, parts, unseen
                )
                x = teacher if count == 1 else x
                if count in wanted[i]:
                    kl = _mean_divergence(model, to_the_end(student, i + count), base)
                    found.append(Run(i, count, kl))
                progress.update()
    return found


def _normed_rows(model: Any, x: Tensor, batch: Any, begin: int) -> Tensor:
    """The head's input at the LoRA positions, from the stream before layer `begin`."""
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
