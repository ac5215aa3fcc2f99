"""Quantized copies of a tiny model, in the formats of public tools, written on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GROUP = 32  # channels that share a scale in the INT4 formats
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Parts = dict[str, Tensor]


def int8(weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors' W8A8: one scale per output channel.

    Codes use seven of the eight bits: oneDNN adds products in pairs of 16 bits where the processor
    has no VNNI, and larger codes would overflow them (docs/quantized.md).
    """
    scale = weight.abs().amax(1, keepdim=True) / 63
    q = (weight / scale).round().clamp(-63, 63)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale


def fp8(weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors' FP8: one scale per output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.float() * scale


def int4(weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors' W4A16: q * scale, with a scale per group."""
    groups = weight.view(weight.shape[0], -1, GROUP)  # [N, K / GROUP, GROUP]
    scale = (groups.abs().amax(2) / 7).to(torch.bfloat16).float()
    q = (groups / scale[:, :, None]).round().clamp(-8, 7)
    return {
        "weight_packed": _pack((q + 8).flatten(1).int()),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape),
    }, (q * scale[:, :, None]).flatten(1)


def gptq(weight: Tensor) -> tuple[Parts, Tensor]:
    """GPTQ's symmetric INT4: (q - 8) * scale."""
    groups = weight.T.reshape(-1, GROUP, weight.shape[0])  # [K / GROUP, GROUP, N]
    scale = (groups.abs().amax(1) / 7).to(torch.bfloat16).float()
    q = (groups / scale[:, None]).round().clamp(-8, 7)
    real = (q * scale[:, None]).flatten(0, 1).T
    codes = (q + 8).flatten(0, 1).int()  # [K, N]
    zeros = torch.full((scale.shape[0], scale.shape[1]), 7, dtype=torch.int32)  # 8 - 1
    return {
        "qweight": _pack(codes.T).T.contiguous(),
        "qzeros": _pack(zeros),
        "scales": scale.to(torch.bfloat16),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, real


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    """AWQ's INT4 with zero points: (q - z) * scale."""
    groups = weight.T.reshape(-1, GROUP, weight.shape[0])
    least, most = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = ((most - least) / 15).to(torch.bfloat16).float()
    zero = (-least / scale).round().clamp(0, 15)
    q = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    real = ((q - zero[:, None]) * scale[:, None]).flatten(0, 1).T
    codes = q.flatten(0, 1).int()
    return {
        "qweight": _pack(codes, AWQ_ORDER),
        "qzeros": _pack(zero.int(), AWQ_ORDER),
        "scales": scale.to(torch.bfloat16),
    }, real


def _pack(codes: Tensor, order: list[int] | None = None) -> Tensor:
    """Eight 4-bit codes of the last axis in one int32."""
    eights = codes.view(*codes.shape[:-1], -1, 8)[..., order or list(range(8))].long()
    packed = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _compressed(bits: dict[str, Any], form: str) -> dict[str, Any]:
    """Settings of compressed-tensors; inputs are rounded too if the weights have no groups."""
    symmetric = bits | {"symmetric": True}
    weights = {"strategy": "channel", "dynamic": False}
    inputs = symmetric | {"strategy": "token", "dynamic": True}
    if form == "pack-quantized":
        weights, inputs = weights | {"strategy": "group", "group_size": GROUP}, None
    group = {
        "targets": ["Linear"],
        "weights": symmetric | weights,
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


KINDS: dict[str, tuple[Callable[[Tensor], tuple[Parts, Tensor]], dict[str, Any]]] = {
    "int8": (int8, _compressed({"num_bits": 8, "type": "int"}, "int-quantized")),
    "int4": (int4, _compressed({"num_bits": 4, "type": "int"}, "pack-quantized")),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "fp8": (fp8, _compressed({"num_bits": 8, "type": "float"}, "float-quantized")),
}


def quantize(model: Any, folder: Path, kind: str) -> None:
    """Saves a quantized copy of a Hugging Face model, and gives the model what is left of it.

    The layers' linear weights become the dequantized ones, in place.
    """
    encode, settings = KINDS[kind]
    tensors: Parts = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            prefix = f"model.layers.{name}"
            del tensors[f"{prefix}.weight"]
            parts, real = encode(module.weight.data)
            tensors |= {f"{prefix}.{part}": t.contiguous() for part, t in parts.items()}
            module.weight.data = real.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def round_inputs(model: Any, kind: str) -> None:
    """Rounds what the layers' linear modules read as the kernels of W8A8 formats do."""
    encode = {"int8": _int8_rows, "fp8": _fp8_rows}.get(kind)
    for module in model.model.layers.modules():
        if encode and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (encode(args[0]),))


def _int8_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def _fp8_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
