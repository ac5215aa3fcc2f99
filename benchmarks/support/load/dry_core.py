"""vLLM's real scheduler and block pool with or without our hook, as an engine core builds them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from lora_drop_vllm.engine.kv_cache import AlwaysOnSpec, DropLayerSpec


def prepare(model: Path) -> Any:
    """vLLM's config of a model served with LoRA-Drop; also does an engine core's one-time setup."""
    config = EngineArgs(
        str(model),
        model_impl="lora_drop",
        additional_config={"lora_drop": {"untrained": True}},
        skip_tokenizer_init=True,
        enforce_eager=True,
    ).create_engine_config()
    register_all_kvcache_specs(config)
    init_none_hash(sha256)
    return config


@dataclass(frozen=True)
class Core:
    """Settings of an engine core.

    Attributes:
        block_sizes: tokens per block of each KV group: one, or the always-on and the drop layers'
        scheduling: values of vLLM's scheduler config
        lora_drop: values of our settings that differ from the prepared ones
    """

    num_blocks: int
    block_sizes: Sequence[int]
    max_model_len: int
    prefix_caching: bool
    scheduling: Mapping[str, Any]
    lora_drop: Mapping[str, Any]


def make_scheduler(prepared: Any, scheduler_class: type, core: Core) -> tuple[Any, Any]:
    """The scheduler that an engine core would build, and its hasher of token blocks."""
    config = copy.copy(prepared)
    config.model_config = copy.copy(config.model_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.cache_config = copy.copy(config.cache_config)
    config.model_config.max_model_len = core.max_model_len
    for name, value in core.scheduling.items():
        setattr(config.scheduler_config, name, value)
    config.cache_config.enable_prefix_caching = core.prefix_caching
    config.cache_config.num_gpu_blocks = core.num_blocks
    config.cache_config.block_size = core.block_sizes[0]
    settings = config.additional_config["lora_drop"] | dict(core.lora_drop)
    config.additional_config = {"lora_drop": settings}
    kinds = (AlwaysOnSpec, DropLayerSpec) if len(core.block_sizes) > 1 else (FullAttentionSpec,)
    plain: dict[str, Any] = dict(num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [
        KVCacheGroupSpec([kind.__name__], kind(block_size=size, **plain))
        for kind, size in zip(kinds, core.block_sizes, strict=True)
    ]
    kv_cache_config = KVCacheConfig(core.num_blocks, [], groups)
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
    scheduler = scheduler_class(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=SimpleNamespace(accept_tokens=lambda request, tokens: True),
        block_size=block_size,
        hash_block_size=hash_block_size,
        log_stats=False,
    )
    return scheduler, get_request_block_hasher(hash_block_size, sha256)
