"""Scheduler hook: follows every request's phase, decides each step's kind, sends the plan along."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from lora_drop_vllm.engine import metrics
from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.kv_cache import DropLayerManager, allow_partial_prefix_hits
from lora_drop_vllm.engine.request_args import request_k
from lora_drop_vllm.method.schedule import PhaseTracker, Scheduled, StepPlan, StepTotals

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

PLAN_ATTRIBUTE = "lora_drop"  # on every SchedulerOutput; pickled to the workers with it


class LoRADropScheduler(AsyncScheduler):
    """vLLM's scheduler, plus the cycle of full and LoRA steps.

    What is scheduled, and when, is vLLM's own decision; the kind of the step follows from it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_drop = active_config(self.vllm_config)
        self.tracker = PhaseTracker(self.max_num_running_reqs, self.lora_drop.kv_skips)
        self._reported = StepTotals()
        self.drop_managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, DropLayerManager)
        ]
        if bool(self.drop_managers) != self.lora_drop.kv_skips:
            raise RuntimeError("the drop layers did not get a KV-cache group of their own")
        if self.drop_managers:
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                manager.tracker = self.tracker
            allow_partial_prefix_hits(self.kv_cache_manager.coordinator)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # before super(), which moves num_computed_tokens past this step
        setattr(scheduler_output, PLAN_ATTRIBUTE, self._plan(scheduler_output))
        super()._update_after_schedule(scheduler_output)

    def _plan(self, scheduler_output: SchedulerOutput) -> StepPlan:
        scheduled = []
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            if request_id not in self.tracker:
                self.tracker.admit(request_id, self._k(request), request.num_tokens)
            scheduled.append(Scheduled(request_id, request.num_computed_tokens, num_tokens))
        return self.tracker.advance(scheduled)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """vLLM's prefix hit; none where the copy of a shared block could never find room.

        A hit that ends inside a block takes one block more than the request itself, for good
        when the pool was made for one request of this length.
        """
        hit = super()._get_local_prefix_cache_hit(request)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        needed = sum(
            -(-request.num_tokens // m.block_size) + (hit[1] % m.block_size > 0) for m in managers
        )
        if hit[1] and needed > self.kv_cache_manager.block_pool.num_gpu_blocks - 1:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return hit

    def _k(self, request: Request) -> int:
        params = request.sampling_params
        return request_k(params.extra_args if params else None, self.lora_drop.k)

    def _free_request_blocks(self, request: Request) -> None:
        super()._free_request_blocks(request)
        self.tracker.release(request.request_id)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's stats, with ours aboard."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            totals = self.tracker.totals
            metrics.attach(stats, totals, self._reported, self.num_drop_blocks())
            self._reported = replace(totals)
        return stats

    def num_drop_blocks(self) -> int:
        """KV blocks that requests hold for the drop layers right now."""
        return sum(
            len(blocks)
            for manager in self.drop_managers
            for blocks in manager.req_to_blocks.values()
        )
