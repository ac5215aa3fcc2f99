"""The V1 runner (CPU): the order of the requests in its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def batch_order_v1(runner: Any) -> Callable[[], Sequence[str]]:
    """A function that returns the batch's requests, whose order `execute_model` settles."""
    return lambda: runner.input_batch.req_ids
