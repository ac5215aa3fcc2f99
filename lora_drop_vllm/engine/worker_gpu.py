"""The CUDA worker."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from lora_drop_vllm.engine.worker import PlanReceiver


class LoRADropGPUWorker(PlanReceiver, Worker):
    """vLLM's GPU worker, with a plan for every step."""
