"""The CPU worker, apart from the others because importing vLLM's changes the process."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.worker import PlanReceiver


class LoRADropCPUWorker(PlanReceiver, CPUWorker):
    """vLLM's CPU worker with a plan for every step."""

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
