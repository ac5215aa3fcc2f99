"""`lora-drop cost`: KV and ideal speed of a model over rho and k (Fig. 3), by the closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.method.cost import LayerReads, ideal_speed, kv_slots
from lora_drop_vllm.method.layers import choose_layers, eligible_layers, num_drop_layers

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
RHOS = (0.25, 0.5, 0.75)
KS = (1, 2, 3, 5)


@dataclass(frozen=True)
class Cost:
    """One request under one rho and k, with `kv: skip`.

    Attributes:
        drop_layers: number of drop layers
        kv_mb, kv_mb_stock: keys and values of prompt and generated tokens, in 10^6 bytes
        kv_saved: share of the KV of all tokens that is never written
        ideal_speed: S_ideal if only the layers cost time and all cost the same
        ideal_speed_attention: the same if only their attention drops (`injection: attn`), whose
            share of a layer is that of the values it reads: its weights, and keys and values
    """

    rho: float
    k: int
    drop_layers: int
    kv_mb: float
    kv_mb_stock: float
    kv_saved: float
    ideal_speed: float
    ideal_speed_attention: float


@dataclass(frozen=True)
class CostResult:
    """What LoRA-Drop would save for one model.

    Attributes:
        model: as it was named
        prompt, tokens: length of the prompt, and tokens generated
        dtype: of the KV cache
        context: tokens whose keys and values a step reads, of all its requests together
        num_layers: layers of the model
        rows: one entry per rho and k
    """

    model: str
    prompt: int
    tokens: int
    dtype: str
    context: int
    num_layers: int
    rows: tuple[Cost, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.num_layers} layers, prompt {self.prompt}, {self.tokens} "
            f"generated, {self.dtype}; attention alone at a context of {self.context} tokens",
            f"{'rho':>5}{'k':>4}{'dropped':>9}{'KV MB':>10}{'stock':>10}{'saved':>8}{'ideal':>8}"
            f"{'attention':>11}",
        ]
        lines += [
            f"{c.rho:>5.2f}{c.k:>4}{c.drop_layers:>9}{c.kv_mb:>10.2f}{c.kv_mb_stock:>10.2f}"
            f"{c.kv_saved:>8.1%}{c.ideal_speed:>7.2f}x{c.ideal_speed_attention:>10.2f}x"
            for c in self.rows
        ]
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The JSON object that `lora-drop cost --json` writes."""
        names = ("model", "prompt", "tokens", "dtype", "context")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"rows": [asdict(row) for row in self.rows]}

    def curves(self) -> dict[int, list[tuple[float, float]]]:
        """Share of the KV saved by rho, for each k."""
        found: dict[int, list[tuple[float, float]]] = {}
        for row in self.rows:
            found.setdefault(row.k, []).append((row.rho, row.kv_saved))
        return found


def cost(
    model: str | Path,
    rhos: Sequence[float] = RHOS,
    ks: Sequence[int] = KS,
    *,
    prompt: int = 0,
    tokens: int = 32768,
    dtype: str = "bfloat16",
    context: int = 0,
) -> CostResult:
    """Computes KV saving and ideal speed over rho and k (Eqs. 7-16), offline.

    Args:
        model: folder, or a name in the local Hugging Face cache; only its config is read
        rhos: shares of the eligible layers that drop, 0 to 1
        ks: LoRA steps between two full steps, each 1 or more
        prompt, tokens: length of the prompt, and tokens generated
        dtype: of the KV cache: `bfloat16`, `float16` or `float32`
        context: tokens whose keys and values a step reads, of all its requests together, beside its
            weights; it counts for the speed of layers that drop only their attention

    Raises:
        ValueError: there is no such model, or one of the other values is not allowed.
    """
    for name, value, ok, allowed in (
        *(("rho", rho, 0 <= rho <= 1, "0 to 1; write 0.25 for a quarter") for rho in rhos),
        *(("k", k, k >= 1, "1 or more") for k in ks),
        ("prompt", prompt, prompt >= 0, "0 or more"),
        ("tokens", tokens, tokens >= 1, "1 or more"),
        ("context", context, context >= 0, "0 or more"),
        ("dtype", dtype, dtype in BYTES, f"one of {', '.join(BYTES)}"),
    ):
        if not ok:
            raise ValueError(f"--{name} {value}: expected {allowed}")
    config = _config(str(model))
    n, reads = config.num_hidden_layers, LayerReads.of(config)
    per_slot, share = reads.token * BYTES[dtype] / 1e6, reads.share(context)
    rows = tuple(_cost(n, rho, k, prompt, tokens, per_slot, share) for rho in rhos for k in ks)
    return CostResult(str(model), prompt, tokens, dtype, context, n, rows)


def _cost(
    n: int, rho: float, k: int, prompt: int, tokens: int, per_slot: float, share: float
) -> Cost:
    drop = choose_layers("contiguous", num_drop_layers(rho, n), eligible_layers(n))
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
        ideal_speed_attention=ideal_speed([1.0] * n, (), k, 0.0, drop, share),
    )


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except OSError as error:
        raise ValueError(f"{model}: no such model folder, nor one in the local cache") from error
