"""The CPU worker, apart from the others because importing vLLM's changes the process."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from lora_drop_vllm.engine.worker import PlanReceiver


class LoRADropCPUWorker(PlanReceiver, CPUWorker):
    """vLLM's CPU worker with a plan for every step."""
