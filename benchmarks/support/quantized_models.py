"""Quantized models in compressed-tensors' format: their names, and their offline twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def kind_of(folder: Path) -> str:
    """Name of a model's numbers, such as `BF16`, `INT8 (W8A8)` or `INT4 (W4A16)`.

    Raises:
        ValueError: the model is quantized in another way.
    """
    config = json.loads((folder / "config.json").read_text())
    quantized = config.get("quantization_config")
    if quantized is None:
        dtype = config.get("dtype") or config["torch_dtype"]
        return str(dtype).replace("bfloat", "bf").upper()
    groups = list(quantized.get("config_groups", {}).values())
    bits = [_bits(group) for group in groups if group["weights"]["type"] == "int"]
    if bits in (["W8A8"], ["W4A16"]):
        return f"INT{bits[0][1]} ({bits[0]})"
    raise ValueError(
        f"{folder}: expected a model as benchmarks/quantize_model.py writes it, W8A8 or W4A16 in "
        "the format of compressed-tensors"
    )


def _bits(group: dict[str, Any]) -> str:
    inputs = group.get("input_activations")
    return f"W{group['weights']['num_bits']}A{inputs['num_bits'] if inputs else 16}"


def open_offline(folder: Path) -> Any:
    """A model in fp32 on the CPU, with the weights and the inputs that a quantized one computes on.

    Transformers dequantizes the weights. Inputs of 8 bits are rounded as vLLM's kernels do it, to
    the largest of a token over 127; compressed-tensors itself would take 127.5.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = json.loads((folder / "config.json").read_text())
    how = CompressedTensorsConfig(dequantize=True) if "quantization_config" in config else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=how
    )
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            module.quantization_enabled = False
            if scheme.input_activations:
                module.register_forward_pre_hook(lambda _, given: (_rounded(given[0]),))
    return model


def _rounded(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / scale).round() * scale
