"""`lora-drop cost`: KV and ideal speed of a model over rho and k (Fig. 3), by the closed forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.method.cost import ideal_speed, kv_slots
from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers
from lora_drop_vllm.plots import plot_saving, require_matplotlib

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """One request under one setting, `kv: skip`.

    Attributes:
        kv_mb, kv_mb_stock: keys and values of prompt and generated tokens, in 10^6 bytes
        kv_saved: share of the KV of all tokens that is never written
        ideal_speed: S_ideal if nothing but the layers cost anything and all cost the same
    """

    rho: float
    k: int
    drop_layers: int
    kv_mb: float
    kv_mb_stock: float
    kv_saved: float
    ideal_speed: float


def cost(
    model: str,
    rhos: Sequence[float],
    ks: Sequence[int],
    *,
    prompt: int = 0,
    tokens: int = 32768,
    dtype: str = "bfloat16",
    out: Path | None = None,
    plot: Path | None = None,
) -> str:
    """A table over rho and k; the same as JSON in `out`, and as a figure in `plot`.

    Args:
        model: folder, or a name in the local Hugging Face cache; only its config is read
        prompt, tokens: length of the prompt, and tokens generated

    Raises:
        ValueError: no such model, or a rho or dtype that cannot be.
    """
    if plot is not None:
        require_matplotlib("--plot")
    config = _config(model)
    per_slot = 2 * config.num_key_value_heads * _head_dim(config) * BYTES[dtype] / 1e6
    costs = [
        _cost(config.num_hidden_layers, rho, k, prompt, tokens, per_slot)
        for rho in rhos
        for k in ks
    ]
    if out is not None:
        settings = {"model": model, "prompt": prompt, "tokens": tokens, "dtype": dtype}
        out.write_text(json.dumps(settings | {"rows": [asdict(c) for c in costs]}, indent=2) + "\n")
    if plot is not None:
        plot_saving({k: [(c.rho, c.kv_saved) for c in costs if c.k == k] for k in ks}, [], plot)
    lines = [
        f"{model}: {config.num_hidden_layers} layers, prompt {prompt}, {tokens} generated, {dtype}",
        f"{'rho':>5}{'k':>4}{'dropped':>9}{'KV MB':>10}{'stock':>10}{'saved':>8}{'ideal':>8}",
    ]
    lines += [
        f"{c.rho:>5.2f}{c.k:>4}{c.drop_layers:>9}{c.kv_mb:>10.2f}{c.kv_mb_stock:>10.2f}"
        f"{c.kv_saved:>8.1%}{c.ideal_speed:>7.2f}x"
        for c in costs
    ]
    return "\n".join(lines)


def _cost(n: int, rho: float, k: int, prompt: int, tokens: int, per_slot: float) -> Cost:
    eligible = eligible_layers(n)
    if not 0 <= rho <= 1:
        raise ValueError(f"--rho {rho}: expected 0 to 1; write 0.25 for a quarter")
    drop = choose_layers("contiguous", num_drop_layers(rho, n), eligible)
    stock = n * (prompt + tokens)
    held = (n - len(drop)) * (prompt + tokens) + len(drop) * kv_slots(prompt, tokens, k)
    return Cost(
        rho=rho,
        k=k,
        drop_layers=len(drop),
        kv_mb=held * per_slot,
        kv_mb_stock=stock * per_slot,
        kv_saved=1 - held / stock,
        ideal_speed=ideal_speed([1.0] * n, drop, k, 0.0),
    )


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except OSError as error:
        raise ValueError(f"{model}: no such model folder, nor one in the local cache") from error


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
