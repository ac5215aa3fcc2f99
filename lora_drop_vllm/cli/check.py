"""`lora-drop check`: whether a model and an adapter fit, and what serving them would save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.config import LoRADropConfig, resolve
from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.method.cost import (
    LayerReads,
    kv_saving,
    layers_only_speed,
    packed_block_sizes,
    packing_waste,
)

BLOCK_UNITS = {"cpu": 32, "gpu": 16}  # tokens a KV block must be a multiple of


@dataclass(frozen=True)
class BlockPool:
    """Blocks of the KV pool on one kind of device.

    Attributes:
        block_tokens: tokens in a block of the layers that always run, and of the drop layers
        wasted: share of a block that the lighter kind leaves unused
    """

    block_tokens: tuple[int, int]
    wasted: float


@dataclass(frozen=True)
class CheckResult:
    """A model and an adapter that fit, and what serving them would save.

    Attributes:
        model: type, layers and width of the model
        config: the settings that vLLM would serve
        ideal_speed: S_ideal if only the layers cost time, all the same; attention and MLP share it
            as they share a layer's weights
        kv_saved: share of the KV of generated tokens that is never written
        pools: `cpu` and `gpu`; empty if no LoRA step would leave KV out
    """

    model: BaseModel
    config: LoRADropConfig
    ideal_speed: float
    kv_saved: float
    pools: dict[str, BlockPool]

    def __str__(self) -> str:
        return "\n".join(f"{name:<30}{value}" for name, value in self.report().items())

    def report(self) -> dict[str, Any]:
        """The JSON object that `lora-drop check --json` prints."""
        config = self.config
        report: dict[str, Any] = {
            "fits": True,
            "model": str(self.model),
            "drop_layers": list(config.drop_layers),
            "drop_attention": list(config.drop_attention),
            "rho": round(config.rho, 3),
            "k": config.k,
            "reuse": config.reuse,
            "kv": config.kv,
            "injection": config.injection,
            "rank": config.rank,
            "ideal_speed_layers_only": round(self.ideal_speed, 3),
            "kv_saved_per_generated_token": round(self.kv_saved, 4),
        }
        for device, pool in self.pools.items():
            report[f"kv_block_tokens_{device}"] = list(pool.block_tokens)
            report[f"kv_pool_wasted_{device}"] = round(pool.wasted, 4)
        return report


def check(model: str | Path, adapter: str | Path) -> CheckResult:
    """Checks offline that an adapter fits a model; neither's weights run.

    Args:
        model: folder, or a name in the local Hugging Face cache; only its config is read
        adapter: the adapter's folder, read in full

    Raises:
        ValueError: they do not fit, or one of them cannot be read.
    """
    from transformers import AutoConfig

    try:
        text_config = AutoConfig.from_pretrained(str(model)).get_text_config()
    except OSError as error:
        raise ValueError(f"{model}: no such model folder, nor one in the local cache") from error
    base = BaseModel.of(text_config)
    config = resolve({"adapter": str(adapter)}, base)
    n, drop = base.num_hidden_layers, config.sites.layers
    skips = config.kv_skips and config.active
    return CheckResult(
        model=base,
        config=config,
        ideal_speed=layers_only_speed(n, config.sites, config.k, LayerReads.of(text_config)),
        kv_saved=kv_saving(n, len(drop), config.k) if config.kv_skips else 0.0,
        pools={
            device: _pool(n - len(drop), len(drop), unit)
            for device, unit in (BLOCK_UNITS.items() if skips else ())
        },
    )


def _pool(always_on: int, drop: int, unit: int) -> BlockPool:
    sizes = packed_block_sizes(always_on, drop, unit)
    return BlockPool(sizes, packing_waste(always_on, drop, *sizes))
