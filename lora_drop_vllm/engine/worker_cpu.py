"""The CPU worker, apart from the others because importing vLLM's changes the process."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.worker import PlanReceiver


class LoRADropCPUWorker(PlanReceiver, CPUWorker):
    """vLLM's CPU worker with a plan for every step."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Samples; the generators of prompts that go on are kept out of it.

        vLLM samples for such a prompt too, throws the token away and turns its generator back,
        which a CPU's cannot: a seeded prompt of two chunks ends vLLM 0.32's V1 runner.
        """
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        runner = self.model_runner
        generators = runner.input_batch.generators
        going_on = runner.discard_request_mask.np
        held = {row: generators.pop(row) for row in list(generators) if going_on[row]}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(held)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Loads weights again, in place.

        Raises:
            RuntimeError: LoRA steps would go on with their own packed copy of old projections.
        """
        if not active_config(self.vllm_config).kv_skips:
            raise RuntimeError(
                "reload_weights: not possible on a CPU with lora_drop.kv='write', because the drop "
                "layers have a packed copy of their K and V projections; start the server again, "
                "or serve with lora_drop.kv='skip'"
            )
        super().reload_weights(*args, **kwargs)
