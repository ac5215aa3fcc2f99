"""The witness: the first full step must fill the states of every drop layer.

A drop layer is vLLM's own layer with its class exchanged. Whatever calls the old class instead (a
`forward` bound to the instance, a graph of another module) computes a plausible full step and
leaves the states as they were; every LoRA step then adds garbage. The states are therefore looked
at once, after the first full step with requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def states_filled(states: Tensor, slots: Sequence[int], layers: Sequence[int]) -> Iterator[None]:
    """Run a full step inside. Waits for the device once, when the step is over.

    Args:
        states: [n_sites, max_requests, d]
        slots: state slots of the requests in the step
        layers: the drop layer of each site

    Raises:
        RuntimeError: a drop layer did not fill the states of these requests.
    """
    rows = torch.tensor(slots, device=states.device)
    states[:, rows] = float("nan")  # also what any state computed from an unfilled one is
    yield
    unfilled = states[:, rows].isnan().flatten(1).any(1).tolist()
    if missed := sorted({layer for layer, nan in zip(layers, unfilled) if nan}):
        raise RuntimeError(
            f"layers {missed} of lora_drop.drop_layers did not run as drop layers in a full step "
            "(their states are unfilled or NaN). Something calls vLLM's own layer instead, or the "
            "model computes NaN. Serve without the feature that wraps layers, or without "
            "--model-impl lora_drop."
        )
