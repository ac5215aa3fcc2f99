"""Our scheduler without a model, with a record of the calls of its hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from support.load import dry_core
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

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
    drops: str  # the setting that lists layer 3: `drop_layers` or `drop_attention`

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


def make_scheduler(vllm_config: Any, setup: Setup) -> tuple[Any, Any]:
    """The scheduler of this setup, and its hasher of token blocks."""
    of_vllm = ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold")
    of_vllm += ("async_scheduling", "policy")
    core = dry_core.Core(
        setup.num_blocks,
        setup.group_sizes,
        setup.max_model_len,
        setup.prefix_caching,
        {name: getattr(setup, name) for name in of_vllm},
        {name: getattr(setup, name) for name in ("k", "kv", "prompts")}
        | {"drop_layers": [], "drop_attention": [], setup.drops: [3]},
    )
    return dry_core.make_scheduler(vllm_config, WatchedScheduler, core)
