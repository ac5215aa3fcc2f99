"""Adapters in closed form: layer by layer, on the student's own inputs (Sec. II-E).

A window of text is split into a prompt and decoded tokens under the served schedule. In model
order, each drop layer's update is a ridge regression at the LoRA positions, of what the base
model's stream is there minus the reuse term, on the layer's input; the map is cut to rank r by the
leading right-singular directions of the fitted values. The student then runs on with the result, so
that the next layer is fitted on what it will really see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_drop_vllm.method.adapter import AdapterConfig, save_adapter
from lora_drop_vllm.method.layers import eligible_layers
from lora_drop_vllm.method.reuse import REUSE
from lora_drop_vllm.offline.masks import use_backend
from lora_drop_vllm.offline.parallel import (
    TOKENS_AT_ONCE,
    Batch,
    base_model,
    kept,
    refresh,
    run_layer,
    update,
)
from lora_drop_vllm.offline.positions import Schedule, rows, take
from lora_drop_vllm.offline.trainable import Site, named

RIDGE = 1e-2  # relative to the mean eigenvalue of the inputs' second moment
FITTED = ("anchor", "update", "none")  # `previous` is recurrent: it has no closed form


def fit(
    model_folder: Path,
    text: str,
    out: Path,
    *,
    drop_layers: list[int],
    k: int = 3,
    rank: int = 16,
    reuse: str = "update",
    kv: str = "skip",
    windows: int = 96,
    length: int = 256,
    prompt: int = 48,
) -> AdapterConfig:
    """Fit an adapter to `windows` windows of `text` and save it.

    Raises:
        ValueError: the rule has no closed form, k is 0, or the text is too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if reuse not in FITTED:
        raise ValueError(f"reuse={reuse!r}: no closed form; one of {', '.join(FITTED)}")
    if k < 1:
        raise ValueError(f"k={k}: expected 1 or more; without LoRA steps there is nothing to fit")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if ids.numel() < windows * length:
        raise ValueError(f"{windows} windows of {length} tokens need a longer text")
    batch = ids[: windows * length].view(windows, length)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    base = base_model(model)
    config = AdapterConfig(
        base_model_name_or_path=model_folder.name,
        base_model=base,
        r=rank,
        lora_alpha=float(rank),
        rho=len(drop_layers) / len(eligible_layers(base.num_hidden_layers)),
        k=k,
        drop_layers=drop_layers,
        reuse=reuse,
        kv=kv,
        injection="block",
    )
    save_adapter(out, config, fit_tensors(model, batch, config, prompt))
    return config


@torch.no_grad()
def fit_tensors(
    model: Any, windows: Tensor, config: AdapterConfig, prompt: int
) -> dict[str, Tensor]:
    """Adapter tensors for windows [N, T] of token ids that begin with `prompt` prompt tokens."""
    use_backend(model, "sdpa")
    parts = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
    batches = [
        Batch.of(model, Schedule.of(rows([part.shape[1]] * len(part)), prompt, config.k), config.kv)
        for part in parts
    ]
    teacher = [model.model.embed_tokens(part) for part in parts]
    student = teacher
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(tqdm(model.model.layers, desc="Fitting", unit="layer")):
        target = [run_layer(layer, x, batch) for x, batch in zip(teacher, batches)]
        if i in config.drop_layers:
            streams = [refresh(layer, x, b, config.kv) for x, b in zip(student, batches)]
            site = _fit_layer(*_lora_rows(student, target, streams, batches, config), config)
            student = [
                update(x, stream, batch, config, [site])
                for x, stream, batch in zip(student, streams, batches)
            ]
            tensors |= named(config, i, [site])
        elif student is teacher:
            student = target
        else:
            student = [run_layer(layer, x, batch) for x, batch in zip(student, batches)]
        teacher = target
    return tensors


def _lora_rows(
    student: list[Tensor],
    target: list[Tensor],
    streams: list[list[Tensor]],
    batches: list[Batch],
    config: AdapterConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input, the base model's output and what is reused, [M, d] over all batches."""
    x, y, c = [], [], []
    for inputs, outputs, stream, batch in zip(student, target, streams, batches):
        state = kept(stream[0], stream[-1], REUSE[config.reuse], None)
        x.append(take(inputs, batch.layout.lora_at))
        y.append(take(outputs, batch.layout.lora_at))
        c.append(torch.zeros_like(x[-1]) if state is None else take(state, batch.layout.slots))
    return torch.cat(x), torch.cat(y), torch.cat(c)


def _fit_layer(x: Tensor, target: Tensor, state: Tensor, config: AdapterConfig) -> Site:
    """Gate, A and B of one layer.

    Args:
        x, target, state: [M, d]  at LoRA positions: the layer's input, the base model's output, c_i
            with g = 1
    """
    rule = REUSE[config.reuse]
    term, gate = rule.beta * x, None
    if rule.difference:
        gate = ((target - term) * state).sum(0) / (state * state).sum(0).clamp(min=1e-12)
        state = gate * state
    inputs, rest = x.double(), (target - term - state).double()
    moment = inputs.T @ inputs
    moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    weight = torch.linalg.solve(moment, inputs.T @ rest)  # [d, d], fitted = inputs @ weight
    fitted = inputs @ weight
    _, vectors = torch.linalg.eigh(fitted.T @ fitted)
    directions = vectors[:, -config.r :]  # [d, r]
    A = (weight @ directions).T.float().contiguous()
    return Site(A, (directions / config.scale).float().contiguous(), gate)
