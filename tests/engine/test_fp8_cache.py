"""`--kv-cache-dtype fp8`: both kinds of layer keep K and V in 8 bits.

vLLM's CPU attention on such a cache is far from exact, so that the oracle cannot follow it token by
token. Stock vLLM is the measure instead: at k = 0 every bit must be its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from environment import V2
from serving import PROMPT, Serve, distance, settings_of
from tiny import load_model, make_adapter

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the interpreter's attention has no FP8 cache on a CPU"),
    pytest.mark.skipif(
        not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache on a CPU needs AVX-512"
    ),
]

TOKENS, K, DROP = 40, 3, [3, 4, 6]


@pytest.mark.matrix
@pytest.mark.parametrize(("kv", "dtype"), [("skip", "fp8"), ("write", "fp8_e4m3")])
def test_an_fp8_cache(
    serve: Serve, smooth_model: Path, tmp_path: Path, kv: str, dtype: str
) -> None:
    """LoRA steps add no error to stock vLLM's; the other KV mode would."""
    (stock,) = serve(smooth_model, kv_cache_dtype=dtype).generate([PROMPT], TOKENS)
    config, tensors = make_adapter(tmp_path, smooth_model, drop_layers=DROP, kv=kv)
    engine = serve(smooth_model, {"adapter": str(tmp_path)}, kv_cache_dtype=dtype)
    (full,) = engine.generate([PROMPT], TOKENS, extra_args={"lora_drop_k": 0})
    assert (full.tokens, full.logprobs) == (stock.tokens, stock.logprobs)

    (got,) = engine.generate([PROMPT], TOKENS)
    lora = TOKENS - TOKENS // (K + 1)
    assert engine.counts() == {"full": 2 * TOKENS - lora, "lora": lora}
    model, settings = load_model(smooth_model), settings_of(config, tensors)
    other = settings_of(config, tensors, kv="write" if kv == "skip" else "skip")
    plain = settings_of(config, tensors, drop_layers=[], k=0)
    own = distance(model, settings, got)
    assert own < distance(model, other, got)
    assert own < 1.2 * distance(model, plain, stock)
