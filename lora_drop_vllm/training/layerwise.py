"""Adapters in closed form, layer by layer, on the student's own inputs (Sec. II-E).

In model order, `regression.py` fits each site of each drop layer at the LoRA positions. The student
then continues with the result, so the next layer is fitted on its real inputs. Only the streams of
student and base model at one layer are kept. No logits are computed, and layers after the last drop
layer never run.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_drop_vllm.decode.decoder import (
    Batch,
    ends,
    halves,
    kept,
    refresh,
    regressor,
    run_layer,
    through,
    update,
)
from lora_drop_vllm.decode.positions import take
from lora_drop_vllm.method.adapter import AdapterConfig
from lora_drop_vllm.method.reuse import REUSE
from lora_drop_vllm.method.sites import Site
from lora_drop_vllm.training.regression import Moments, fit_site
from lora_drop_vllm.training.samples import HELD_OUT, Sample


@torch.no_grad()
def fit_tensors(model: Any, samples: Sequence[Sample], config: AdapterConfig) -> dict[str, Tensor]:
    """The tensors of the fitted adapter."""
    teacher = [model.model.embed_tokens(sample.tokens) for sample in samples]
    student, tensors = teacher, {}
    batches = [sample.batch for sample in samples]
    layers = model.model.layers[: config.sites.layers[-1] + 1]
    for i, layer in enumerate(tqdm(layers, desc="Fitting", unit="layer")):
        if i in config.sites.parts:
            of, teacher, student = fit_layer(
                layer, teacher, student, batches, config, config.sites.parts[i]
            )
            tensors |= config.sites.named(i, of)
            continue
        shared = student is teacher
        teacher = [run_layer(layer, x, batch) for x, batch in zip(teacher, batches)]
        student = teacher if shared else [run_layer(layer, x, b) for x, b in zip(student, batches)]
    return tensors


def fit_layer(
    layer: Any,
    teacher: list[Tensor],
    student: list[Tensor],
    batches: Sequence[Batch],
    config: AdapterConfig,
    parts: Iterable[str],
    unseen: Container[int] = (),
) -> tuple[dict[str, Site], list[Tensor], list[Tensor]]:
    """The fitted sites of a drop layer, and both streams after it.

    Args:
        teacher, student: [N, T, d] per batch  the layer's input without and with LoRA-Drop
        parts: names of the layer's sites in the order that they run
        unseen: numbers of the batches that serve neither the fit nor the choice of the ridge
    """
    rule = REUSE[config.reuse]
    goals = [halves(layer, x, batch) for x, batch in zip(teacher, batches)]
    streams = [refresh(layer, x, batch, config.kv) for x, batch in zip(student, batches)]
    z = [take(x, batch.layout.lora_at) for x, batch in zip(student, batches)]
    of: dict[str, Site] = {}
    for part in parts:
        around = [ends(stream, part) for stream in streams]
        fitted, held_out = (Moments.zero(z[0].shape[-1], z[0].device) for _ in range(2))
        for number, batch in enumerate(batches):
            if number in unseen:
                continue
            state = kept(*around[number], rule, None)
            (held_out if number % HELD_OUT == 1 else fitted).add(
                regressor(z[number], batch.layout, rule),
                take(ends(goals[number], part)[1], batch.layout.lora_at),
                None if state is None else take(state, batch.layout.slots),
                rule.beta,
            )
        of[part] = fit_site(fitted, held_out, rule, config.r, config.scale)
        z = [
            through(of[part], rows, *sides, batch.layout, config)
            for rows, sides, batch in zip(z, around, batches)
        ]
    outputs = [
        update(layer, x, stream, batch, config, of)
        for x, stream, batch in zip(student, streams, batches)
    ]
    return of, [goal[-1] for goal in goals], outputs
