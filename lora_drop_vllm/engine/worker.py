"""Worker hook: hands each step's plan to the model before the engine's runner starts on it."""

from __future__ import annotations

from typing import Any

from lora_drop_vllm.engine.runner_v1 import batch_order_v1
from lora_drop_vllm.engine.runner_v2 import batch_order_v2
from lora_drop_vllm.engine.scheduler import PLAN_ATTRIBUTE


class PlanReceiver:
    """Mixed into vLLM's workers."""

    model_runner: Any
    use_v2_model_runner: bool
    _serving = False

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run one engine step under the plan that the scheduler sent along."""
        plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if plan is None:
            # before the first request the engine warms its kernels up with steps of its own
            if self._serving:
                raise RuntimeError("the scheduler sent a step without a LoRA-Drop plan")
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._serving = True
        order = batch_order_v2 if self.use_v2_model_runner else batch_order_v1
        step = self.model_runner.model.lora_drop
        step.begin(plan, order(self.model_runner))
        try:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        finally:
            step.end()
