"""CUDA graphs for both kinds of step, through Model Runner V2's own graph manager.

vLLM keeps one graph per batch shape and number of active LoRA adapters. LoRA-Drop refuses
`--enable-lora`, so that number carries the step's kind instead. It is part of every graph's key, of
what dispatch looks up, and of the piecewise graphs' keys, so no step finds a graph of the other
kind.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from lora_drop_vllm.method.schedule import StepKind
from lora_drop_vllm.method.state import StepState

logger = init_logger("vllm.lora_drop")

KINDS = (StepKind.FULL, StepKind.LORA)  # by vLLM's number of active LoRAs
LORA = KINDS.index(StepKind.LORA)


class StepGraphManager(ModelCudaGraphManager):
    """vLLM's manager with a second set of graphs, in the same memory pool, for LoRA steps.

    Args:
        step: the worker's step state, which knows the current step's kind
        args, kwargs: of vLLM's manager
    """

    def __init__(self, step: StepState, *args: Any, **kwargs: Any) -> None:
        self.step = step
        self.taken = dict.fromkeys(KINDS, 0)  # bytes of GPU memory by kind
        super().__init__(*args, lora_capture_cases=[*range(len(KINDS))], **kwargs)

    def _init_candidates(self) -> None:
        super()._init_candidates()
        # a LoRA step has one token per request, so each size needs only the first graph that fits
        reachable = {
            candidates[0]
            for (num_tokens, kind), candidates in self._candidates.items()
            if kind == LORA and 1 <= num_tokens <= self.max_num_reqs
        }
        for key in [key for key in self._candidates if key[1] == LORA]:
            self._candidates[key] = [c for c in self._candidates[key] if c in reachable]
        for mode, descs in self._capture_descs.items():
            needed = [d for d in descs if d.num_active_loras != LORA or d in reachable]
            self._capture_descs[mode] = sorted(needed, key=lambda d: d.num_active_loras)

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Captures the graphs of both kinds and reports the memory of each set."""
        free = torch.accelerator.get_memory_info()[0]

        def account() -> None:
            nonlocal free
            now = torch.accelerator.get_memory_info()[0]
            self.taken[self.step.kind] += free - now
            free = now

        def before_each(kind: int, num_reqs: int, num_tokens: int) -> None:
            account()
            self.step.rehearse(KINDS[kind])

        try:
            super().capture(*args, **(kwargs | {"lora_capture_hook": before_each}))
            account()
        finally:
            self.step.end()
        logger.info(
            "LoRA-Drop CUDA graphs: %s",
            ", ".join(f"{k.value} steps {self.taken[k] / 2**20:.0f} MiB" for k in KINDS),
        )

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        *args: Any,
        **kwargs: Any,
    ) -> BatchExecutionDescriptor:
        """vLLM's choice among the graphs of the current step's kind."""
        kind = KINDS.index(self.step.kind)
        return super().dispatch(num_reqs, num_tokens, uniform_token_count, kind, *args, **kwargs)

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        """Replays a graph and counts the step as the kind that was captured."""
        self.step.ran(KINDS[desc.num_active_loras])
        return super().run_fullgraph(desc)


class StepGraphRunner(GPUModelRunner):
    """Model Runner V2 with our graph manager."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Initializes as vLLM does, then replaces its manager by ours in the mode that it chose."""
        super().initialize_kv_cache(*args, **kwargs)
        assert self.cudagraph_manager is not None
        self.cudagraph_manager = StepGraphManager(
            self.model.lora_drop,
            self.vllm_config,
            self.device,
            self.cudagraph_manager.cudagraph_mode,
            self.decode_query_len,
        )
