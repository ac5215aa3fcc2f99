"""Scheduler hook: follows every request's phase, decides each step's kind, sends the plan along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from lora_drop_vllm.engine import metrics
from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.kv_cache import DropLayerManager, allow_partial_prefix_hits
from lora_drop_vllm.engine.request_args import request_k
from lora_drop_vllm.engine.step_kinds import StepKinds
from lora_drop_vllm.method.schedule import (
    PhaseTracker,
    Scheduled,
    StepPlan,
    StepTotals,
    longest_wait,
    prompts_wait,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

PLAN_ATTRIBUTE = "lora_drop"  # on every SchedulerOutput; pickled to the workers with it


class LoRADropScheduler(AsyncScheduler):
    """vLLM's scheduler, plus the cycle of full and LoRA steps.

    vLLM decides what is scheduled, and the kind of the step follows from it. `method/schedule.py`
    only decides beforehand whether prompts wait (`prompts: wait`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_drop = active_config(self.vllm_config)
        self.tracker = PhaseTracker(self.max_num_running_reqs, self.lora_drop.kv_skips)
        self.step_kinds = StepKinds()
        self._reported = StepTotals()
        self._waited = 0  # steps that deferred prompts, since all prompts were last taken
        self._defers = False  # the step at hand does
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

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedules a step; under `prompts: wait`, prompts are deferred to the next full step."""
        self._defers = self._prompts_wait()
        output = super().schedule(throttle_prefills or self._defers)
        if self._defers:
            self._waited += 1
        elif not any(self._waiting_prompts()):
            self._waited = 0
        return output

    def _prompts_wait(self) -> bool:
        if self.lora_drop.prompts == "now" or self.prefill_capacity_bound:
            return False
        if not any(self._waiting_prompts()):
            return False
        running = [
            self.tracker.phase(r.request_id, in_prompt=r.is_prefill_chunk)
            for r in self.running
            if r.is_prefill_chunk or not self._ends(r)
        ]
        return prompts_wait(
            running, self._waited, longest_wait(self.lora_drop.k, self._prompts_fit())
        )

    def _waiting_prompts(self) -> Iterator[Request]:
        """Requests that a step could take: not those whose grammar is still being compiled."""
        for request in chain(self.kv_holding_waiting, self.waiting):
            grammar = request.structured_output_request
            blocked = request.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
            if not (blocked and grammar and grammar.grammar is None):
                yield request

    def _ends(self, request: Request) -> bool:
        """Tells whether a request's last token is under way, so that no step schedules it again."""
        end = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        return request.num_tokens + request.num_output_placeholders >= end

    def _prompts_fit(self) -> bool:
        """Tells whether one step takes all waiting prompts whole (prefix hits not counted)."""
        room = self.max_num_scheduled_tokens - len(self.running)
        threshold = self.scheduler_config.long_prefill_token_threshold or room
        for request in self._waiting_prompts():
            room -= request.num_tokens
            if room < 0 or request.num_tokens > threshold:
                return False
        return True

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
                self.step_kinds.watch(request)
            scheduled.append(Scheduled(request_id, request.num_computed_tokens, num_tokens))
        return self.tracker.advance(scheduled)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's outputs; requests that asked also get the kind of their step."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        plan: StepPlan = getattr(scheduler_output, PLAN_ATTRIBUTE)
        self.step_kinds.report(outputs, plan.kind, self.requests)
        return outputs

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """vLLM's prefix hit; none for a prompt that has to wait or can never copy a shared block.

        If all but the last token is found, vLLM would schedule it with the decodes even in a step
        that defers prompts. A hit that ends inside a block takes one block more than the
        request itself, for good when the pool was made for one request of this length.
        """
        no_hit = self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        if self._defers:
            return no_hit
        hit = super()._get_local_prefix_cache_hit(request)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        needed = sum(
            -(-request.num_tokens // m.block_size) + (hit[1] % m.block_size > 0) for m in managers
        )
        if hit[1] and needed > self.kv_cache_manager.block_pool.num_gpu_blocks - 1:
            return no_hit
        return hit

    def _k(self, request: Request) -> int:
        """The request's k; the served one if a door without our check let a bad value in."""
        params = request.sampling_params
        try:
            return request_k(params.extra_args if params else None, self.lora_drop.k)
        except ValueError:
            return self.lora_drop.k

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
