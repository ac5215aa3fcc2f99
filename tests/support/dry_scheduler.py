"""vLLM's real scheduler and block pool under our hook, as an engine core builds them."""

from __future__ import annotations

import copy
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
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from lora_drop_vllm.engine.kv_cache import AlwaysOnSpec, DropLayerSpec
from lora_drop_vllm.engine.scheduler import LoRADropScheduler


@dataclass(frozen=True)
class Setup:
    """The settings of one engine: LoRA-Drop, the pool, and vLLM's scheduler."""

    kv: str
    k: int
    block_sizes: tuple[int, int]  # tokens per block of the always-on and of the drop layers
    spare_blocks: int  # more than one request of max_model_len needs
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    async_scheduling: bool
    prefix_caching: bool
    policy: str
    prompts: str

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return self.block_sizes if self.kv == "skip" else self.block_sizes[:1]

    @property
    def num_blocks(self) -> int:
        longest = sum(-(-self.max_model_len // size) for size in self.group_sizes)
        return 1 + longest + self.spare_blocks  # the first is vLLM's null block


class _Throttled(AsyncScheduler):
    """vLLM's scheduler, which records the calls of our hook."""

    deferred = False

    def schedule(self, throttle_prefills: bool = False) -> Any:
        decodes = any(not r.is_prefill_chunk for r in self.running)
        self.deferred = throttle_prefills and not self.prefill_capacity_bound and decodes
        assert not self.deferred or not any(r.is_prefill_chunk for r in self.running), "has begun"
        return super().schedule(throttle_prefills)


class WatchedScheduler(LoRADropScheduler, _Throttled):
    """Our scheduler; `deferred` is true if vLLM deferred the prompts of the current step."""


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


def make_scheduler(vllm_config: Any, setup: Setup) -> tuple[Any, Any]:
    """The scheduler that an engine core would build, and its hasher of token blocks."""
    config = copy.copy(vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.cache_config = copy.copy(config.cache_config)
    config.model_config.max_model_len = setup.max_model_len
    for name in ("max_num_seqs", "max_num_batched_tokens", "async_scheduling", "policy"):
        setattr(config.scheduler_config, name, getattr(setup, name))
    config.scheduler_config.long_prefill_token_threshold = setup.long_prefill_token_threshold
    config.cache_config.enable_prefix_caching = setup.prefix_caching
    config.cache_config.num_gpu_blocks = setup.num_blocks
    config.cache_config.block_size = setup.block_sizes[0]
    settings = config.additional_config["lora_drop"] | {
        name: getattr(setup, name) for name in ("k", "kv", "prompts")
    }
    config.additional_config = {"lora_drop": settings}
    kinds = (AlwaysOnSpec, DropLayerSpec) if setup.kv == "skip" else (FullAttentionSpec,)
    plain: dict[str, Any] = dict(num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [
        KVCacheGroupSpec([kind.__name__], kind(block_size=size, **plain))
        for kind, size in zip(kinds, setup.group_sizes)
    ]
    kv_cache_config = KVCacheConfig(setup.num_blocks, [], groups)
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
    scheduler = WatchedScheduler(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=SimpleNamespace(accept_tokens=lambda request, tokens: True),
        block_size=block_size,
        hash_block_size=hash_block_size,
        log_stats=False,
    )
    return scheduler, get_request_block_hasher(hash_block_size, sha256)
