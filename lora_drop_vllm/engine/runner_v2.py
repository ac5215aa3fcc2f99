"""The V2 runner: the model's state object, which sees each batch before the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class LoRADropModelState(DefaultModelState):
    """Keeps the request ids of the batch at hand, in the batch's order."""

    req_ids: Sequence[str] = ()

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """vLLM's attention metadata; building it, the drop layers ask for the batch's order."""
        self.req_ids = input_batch.req_ids
        metadata = super().prepare_attn(input_batch, *args, **kwargs)
        self.model.lora_drop.rows()  # fills in the slots, where a replayed graph reads them
        return metadata


def batch_order_v2(runner: Any) -> Callable[[], Sequence[str]]:
    """A function that returns the batch's requests, whose order `execute_model` settles."""
    return lambda: runner.model_state.req_ids
