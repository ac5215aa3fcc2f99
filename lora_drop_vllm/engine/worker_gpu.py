"""The CUDA worker."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from lora_drop_vllm.engine.cuda_graphs import StepGraphRunner
from lora_drop_vllm.engine.worker import PlanReceiver


class LoRADropGPUWorker(PlanReceiver, Worker):
    """vLLM's GPU worker with a plan for every step and graphs for both kinds."""

    def _make_model_runner(self) -> Any:
        return StepGraphRunner(self.vllm_config, self.device)
