"""The worker hook: gives each step's plan to the model before the runner starts the step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.runner_v1 import batch_order_v1
from lora_drop_vllm.engine.runner_v2 import batch_order_v2
from lora_drop_vllm.engine.scheduler import PLAN_ATTRIBUTE
from lora_drop_vllm.engine.witness import states_filled
from lora_drop_vllm.method.reuse import REUSE
from lora_drop_vllm.method.schedule import StepKind, StepPlan


class PlanReceiver:
    """A mixin of vLLM's workers."""

    vllm_config: Any
    model_runner: Any
    use_v2_model_runner: bool
    _serving = False
    _witnessed = False

    def execute_model(self, scheduler_output: Any) -> Any:
        """Runs one engine step under the plan that the scheduler sent with it."""
        plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if plan is None:
            # before the first request, the engine warms up its kernels with steps of its own
            if self._serving:
                raise RuntimeError("the scheduler sent a step without a LoRA-Drop plan")
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._serving = True
        order = batch_order_v2 if self.use_v2_model_runner else batch_order_v1
        step = self.model_runner.model.lora_drop
        step.begin(plan, order(self.model_runner))
        try:
            with self._witness(plan):
                return super().execute_model(scheduler_output)  # type: ignore[misc]
        finally:
            step.end()

    def _witness(self, plan: StepPlan) -> AbstractContextManager[None]:
        """The witness around the first full step; nothing around any other step."""
        if self._witnessed or plan.kind is not StepKind.FULL or not plan.rows:
            return nullcontext()
        self._witnessed = True
        config = active_config(self.vllm_config)
        if not REUSE[config.reuse].keeps_state:
            return nullcontext()
        slots = [row.slot for row in plan.rows.values()]
        states = self.model_runner.model.lora_drop.states
        return states_filled(states, slots, config.sites.layer_of_site)
