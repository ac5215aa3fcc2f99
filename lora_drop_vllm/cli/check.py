"""`lora-drop check`: whether a model and an adapter fit, and what serving them would save."""

from __future__ import annotations

import json
from pathlib import Path

from lora_drop_vllm.config import resolve
from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.method.cost import ideal_speed, kv_saving, packed_block_sizes, packing_waste

BLOCK_UNITS = {"CPU": 32, "GPU": 16}  # tokens a KV block must be a multiple of


def check(model: str, adapter: Path, as_json: bool = False) -> str:
    """Text (or JSON) about a pair that fits.

    Raises:
        ValueError: the pair does not fit, or one of them cannot be read.
    """
    from transformers import AutoConfig

    try:
        text_config = AutoConfig.from_pretrained(model).get_text_config()
    except OSError as error:
        raise ValueError(f"{model}: no such model folder, nor one in the local cache") from error
    base = BaseModel.of(text_config)
    config = resolve({"adapter": str(adapter)}, base)
    n, drop = base.num_hidden_layers, list(config.drop_layers)
    facts: dict[str, object] = {
        "fits": True,
        "model": str(base),
        "drop_layers": drop,
        "rho": round(config.rho, 3),
        "k": config.k,
        "reuse": config.reuse,
        "kv": config.kv,
        "injection": config.injection,
        "rank": config.rank,
        "ideal_speed_layers_only": round(ideal_speed([1.0] * n, drop, config.k, 0.0), 3),
        "kv_saved_per_generated_token": (
            round(kv_saving(n, len(drop), config.k), 4) if config.kv_skips else 0.0
        ),
    }
    for device, unit in BLOCK_UNITS.items() if config.kv_skips and config.active else ():
        sizes = packed_block_sizes(n - len(drop), len(drop), unit)
        facts[f"kv_block_tokens_{device.lower()}"] = list(sizes)
        facts[f"kv_pool_wasted_{device.lower()}"] = round(
            packing_waste(n - len(drop), len(drop), *sizes), 4
        )
    if as_json:
        return json.dumps(facts)
    return "\n".join(f"{name:<30}{value}" for name, value in facts.items())
