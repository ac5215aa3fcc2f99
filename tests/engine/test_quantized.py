"""Quantized base models: served tokens beside the oracle on the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from environment import V2
from quantized_tiny import KINDS, quantize, round_inputs
from serving import PROMPT, Serve, distance, settings_of
from tiny import load_model, make_adapter

from lora_drop_vllm.engine.refusals import has_int4_kernel

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="Triton's interpreter has no quantized kernels"),
]

TOKENS, K, DROP = 24, 3, [3, 4, 6]
INT4 = ("int4", "gptq", "awq")
IN_CI = (("int8", "skip"), ("fp8", "write"), ("gptq", "write"))


@pytest.mark.parametrize(
    ("kind", "kv"),
    [
        pytest.param(kind, kv, marks=() if (kind, kv) in IN_CI else pytest.mark.matrix)
        for kind in KINDS
        for kv in ("skip", "write")
    ],
)
def test_a_quantized_model_is_the_dequantized_one(
    serve: Serve, models: dict[str, Path], tmp_path: Path, kind: str, kv: str
) -> None:
    if kind in INT4 and not has_int4_kernel():
        pytest.skip("vLLM has no INT4 kernels for a CPU without AVX-512")
    model = load_model(models["qwen2"])
    config, tensors = make_adapter(
        tmp_path / "adapter", models["qwen2"], drop_layers=DROP, k=K, kv=kv
    )
    settings = settings_of(config, tensors)
    quantize(model, tmp_path / "model", kind)
    # INT4 kernels take no float32; elsewhere bfloat16 would flip roundings to 8 bits
    dtype = "bfloat16" if kind in INT4 else "float32"
    engine = serve(tmp_path / "model", {"adapter": str(tmp_path / "adapter")}, dtype=dtype)
    assert engine.runner.model.model.layers[3].self_attn.qkv_proj.quant_config is not None
    (got,) = engine.generate([PROMPT], TOKENS)
    full = TOKENS // (K + 1)
    assert engine.counts() == {"full": full, "lora": TOKENS - full}

    round_inputs(model, kind)
    near = distance(model.to(getattr(torch, dtype)), settings, got)
    far = distance(load_model(models["qwen2"]), settings, got)  # without quantization
    assert near < 0.2 and near < far / 3, (near, far)
