"""V1 runner (CPU): the order of the requests in its persistent batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def batch_order_v1(runner: Any) -> Callable[[], Sequence[str]]:
    """How to ask the runner for its batch; it settles the order only inside `execute_model`."""
    return lambda: runner.input_batch.req_ids
