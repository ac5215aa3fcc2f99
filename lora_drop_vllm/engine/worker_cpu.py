"""The CPU worker; a module of its own because importing vLLM's has effects on the process."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from lora_drop_vllm.engine.worker import PlanReceiver


class LoRADropCPUWorker(PlanReceiver, CPUWorker):
    """vLLM's CPU worker, with a plan for every step."""
