"""KV cache of a model whose drop layers skip slots: two specs and their managers.

Each kind of layer has a spec that refuses to merge with the other's. vLLM groups specs by
`isinstance`, so it would silently put two subclasses of its full-attention spec into one group
under the stock manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from lora_drop_vllm.engine.seams import check_attributes

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from lora_drop_vllm.method.schedule import PhaseTracker


class _OwnGroup(FullAttentionSpec):
    """A full-attention spec that shares a group with its own class only."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        assert all(type(spec) is cls for spec in specs), "not the same kind of layer"
        return super().merge(specs)


class PromptSharingManager(FullAttentionManager):
    """A manager that shares what was computed as a prompt with other requests, and nothing else.

    A generated token's K and V come after holes and low-rank updates. In the drop layers they are
    not at their positions; in the others they differ from what a prompt would compute.
    """

    tracker: PhaseTracker  # set by the scheduler before the first request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written_this_step: set[int] = set()  # blocks with prompt tokens of the step at hand

    def new_step_starts(self) -> None:
        """Forgets the blocks of the last step."""
        super().new_step_starts()
        self.written_this_step.clear()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """The blocks that the request still needs, or more than the pool has, to make it wait.

        A prefix hit that ends inside a block copies the block before the step runs. While another
        request of the same step still writes that block, the hit must wait.
        """
        if (
            self._has_partial_local_hit(new_computed_blocks, num_local_computed_tokens)
            and new_computed_blocks[-1].block_id in self.written_this_step
        ):
            return self.block_pool.num_gpu_blocks
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Shares the blocks of prompt positions."""
        end = min(num_tokens, self.tracker.prompt_end(request.request_id, request.num_tokens))
        if request.num_computed_tokens < end:
            first = self.num_cached_block.get(request.request_id, 0)
            blocks = self.req_to_blocks[request.request_id][first : -(-end // self.block_size)]
            self.written_this_step.update(block.block_id for block in blocks)
        super().cache_blocks(request, end, retention_interval, replay_boundaries=replay_boundaries)


class DropLayerManager(PromptSharingManager):
    """Blocks of the drop layers under `kv: skip`: one slot per token of a full step.

    The engine counts tokens; this manager subtracts the request's holes, the tokens of its LoRA
    steps. Blocks are handed out before the step's kind is decided. The slot that the request would
    need in a full step is therefore always reserved: at most one slot ahead, and counted as written
    only once it is.
    """

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """The number of blocks that the request's compacted list still needs."""
        compacted = num_tokens - self.tracker.holes(request_id)
        return super().get_num_blocks_to_allocate(request_id, compacted, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocates what the compacted list of `num_tokens` tokens needs."""
        holes = self.tracker.holes(request_id)
        return super().allocate_new_blocks(
            request_id, num_tokens - holes, num_tokens_main_model - holes
        )


@register_kv_cache_spec(manager_class=PromptSharingManager)
@dataclass(frozen=True, kw_only=True)
class AlwaysOnSpec(_OwnGroup):
    """KV cache of a layer that runs in every step: one slot per token."""


@register_kv_cache_spec(manager_class=DropLayerManager)
@dataclass(frozen=True, kw_only=True)
class DropLayerSpec(_OwnGroup):
    """KV cache of a drop layer under `kv: skip`: a compacted list in token order."""


def allow_partial_prefix_hits(coordinator: Any) -> None:
    """Allows a prefix-cache hit to end inside a block, which the engine then copies.

    Whole blocks of both groups end together only at the least common multiple of their sizes, often
    beyond the prompt. vLLM has partial hits but uses them for hybrid Mamba models alone.

    Raises:
        RuntimeError: vLLM no longer has the attributes that switch them on.
    """
    if isinstance(coordinator, HybridKVCacheCoordinator):
        names = ("enable_partial_hash_hits", "single_type_managers", "hash_block_size")
        check_attributes(coordinator, names, "kv_cache.py")
        coordinator.enable_partial_hash_hits = True
        for manager in coordinator.single_type_managers:
            check_attributes(manager, ("cache_hit_alignment_tokens",), "kv_cache.py")
            manager.cache_hit_alignment_tokens = coordinator.hash_block_size
