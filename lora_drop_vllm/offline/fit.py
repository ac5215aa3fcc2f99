"""Adapters in closed form: layer by layer, on the student's own inputs (Sec. II-E).

A window of text is split into a prompt and decoded tokens under the served schedule. In model
order, each drop layer's update is a ridge regression at the LoRA positions, of what the base
model's stream is there minus the reuse term, on the layer's input; the map is cut to rank r by the
leading right-singular directions of the fitted values. The student then runs on with the result, so
that the next layer is fitted on what it will really see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel, save_adapter, tensor_prefix
from lora_drop_vllm.method.layers import eligible_layers
from lora_drop_vllm.method.reuse import REUSE

RIDGE = 1e-2  # relative to the mean eigenvalue of the inputs' second moment
FITTED = ("anchor", "update", "none")  # `previous` is recurrent: it has no closed form


@dataclass(frozen=True)
class Schedule:
    """Which positions of a window are full, and what each looks back to.

    Attributes:
        full: [T] bool  prompt positions and refreshes
        anchor: [T] int  last full position at or before each position
    """

    full: Tensor
    anchor: Tensor

    @classmethod
    def of(cls, length: int, prompt: int, k: int) -> Schedule:
        """A prompt, then cycles of k LoRA positions and a refresh."""
        t = torch.arange(length)
        full = (t < prompt) | ((t - prompt) % (k + 1) == k)
        return cls(full, torch.where(full, t, 0).cummax(0).values)


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
        ValueError: the rule has no closed form, or the text is too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if reuse not in FITTED:
        raise ValueError(f"reuse={reuse!r}: no closed form; one of {', '.join(FITTED)}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if ids.numel() < windows * length:
        raise ValueError(f"{windows} windows of {length} tokens need a longer text")
    batch = ids[: windows * length].view(windows, length)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    base = model.config
    num_layers = base.num_hidden_layers
    config = AdapterConfig(
        base_model_name_or_path=model_folder.name,
        base_model=BaseModel(base.model_type, num_layers, base.hidden_size),
        r=rank,
        lora_alpha=float(rank),
        rho=len(drop_layers) / len(eligible_layers(num_layers)),
        k=k,
        drop_layers=drop_layers,
        reuse=reuse,
        kv=kv,
        injection="block",
    )
    save_adapter(out, config, fit_tensors(model, batch, config, Schedule.of(length, prompt, k)))
    return config


@torch.no_grad()
def fit_tensors(
    model: Any, batch: Tensor, config: AdapterConfig, schedule: Schedule
) -> dict[str, Tensor]:
    """Adapter tensors for windows `batch` [N, T] of token ids."""
    student = model.model.embed_tokens(batch)
    teacher = student
    positions = torch.arange(batch.shape[1])[None]
    rope = model.model.rotary_emb(student, positions)
    causal = torch.ones(batch.shape[1], batch.shape[1]).tril().bool()
    holes = causal & (schedule.full | torch.tensor(config.kv == "write"))[None, :]
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(tqdm(model.model.layers, desc="Fitting", unit="layer")):
        target = _run(layer, teacher, causal, rope)
        if i not in config.drop_layers:
            student, teacher = _run(layer, student, causal, rope), target
            continue
        refreshed = _run(layer, student, holes, rope)
        at = ~schedule.full
        kept = (refreshed - student)[:, schedule.anchor]
        if config.reuse == "anchor":
            kept = refreshed[:, schedule.anchor]
        made, update = _fit_layer(student, target, kept, at, config)
        tensors |= {f"{tensor_prefix(i, '')}.{name}": value for name, value in made.items()}
        student = torch.where(at[None, :, None], update, refreshed)
        teacher = target
    return tensors


def _run(layer: Any, x: Tensor, mask: Tensor, rope: Any) -> Tensor:
    """f^i on windows [N, T, d]; `mask` [T, T] says which keys a position sees."""
    outputs = []
    for part in x.split(8):
        seen = mask[None, None].expand(part.shape[0], 1, -1, -1)
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        out = layer(part, attention_mask=additive, position_embeddings=rope)
        outputs.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(outputs)


def _fit_layer(
    x: Tensor, target: Tensor, kept: Tensor, at: Tensor, config: AdapterConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Gate, A and B of one layer, and its update at every position.

    Args:
        x, target, kept: [N, T, d]  the layer's input, the base model's output, what is reused
        at: [T] bool  the LoRA positions
    """
    rule = REUSE[config.reuse]
    d = x.shape[-1]
    made: dict[str, Tensor] = {}
    term = rule.beta * x
    if rule.difference:
        y, u = (target - term)[:, at].reshape(-1, d), kept[:, at].reshape(-1, d)
        made["gate"] = (y * u).sum(0) / (u * u).sum(0).clamp(min=1e-12)
        term = term + made["gate"] * kept
    elif rule.keeps_state:
        term = term + kept
    inputs, rest = x[:, at].reshape(-1, d).double(), (target - term)[:, at].reshape(-1, d).double()
    moment = inputs.T @ inputs
    moment += RIDGE * moment.diagonal().mean() * torch.eye(d, dtype=moment.dtype)
    weight = torch.linalg.solve(moment, inputs.T @ rest)  # [d, d], fitted = inputs @ weight
    fitted = inputs @ weight
    _, vectors = torch.linalg.eigh(fitted.T @ fitted)
    directions = vectors[:, -config.r :]  # [d, r]
    made["lora_A.weight"] = (weight @ directions).T.float().contiguous()
    made["lora_B.weight"] = (directions / config.scale).float().contiguous()
    update = term + config.scale * (x @ made["lora_A.weight"].T) @ made["lora_B.weight"].T
    return made, update
