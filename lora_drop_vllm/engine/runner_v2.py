"""V2 runner: the model's own state object, which sees each batch before the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class LoRADropModelState(DefaultModelState):
    """Keeps the request ids of the batch at hand, in the batch's order."""

    req_ids: Sequence[str] = ()

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Attention metadata; the drop layers' builder asks for the batch while it is built."""
        self.req_ids = input_batch.req_ids
        metadata = super().prepare_attn(input_batch, *args, **kwargs)
        self.model.lora_drop.rows()  # a replayed graph finds the step's slots in place
        return metadata


def batch_order_v2(runner: Any) -> Callable[[], Sequence[str]]:
    """How to ask the runner for its batch; it settles the order only inside `execute_model`."""
    return lambda: runner.model_state.req_ids
