"""The kernels as torch operators, so that a compiled model calls them without looking inside.

`after` of the updates is not read: a compiled graph keeps, and runs first, whatever produced it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_drop_vllm import kernels

_LIBRARY = torch.library.Library("lora_drop", "DEF")


def _drop_run(
    x: Tensor,
    states: Tensor | None,
    slots: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    beta: float,
    after: Tensor | None,
) -> Tensor:
    return kernels.drop_run(x, states, slots[: x.shape[0]], A, B, scale, beta, False)


def _drop_run_back(
    x: Tensor,
    states: Tensor,
    slots: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    beta: float,
    after: Tensor | None,
) -> Tensor:
    return kernels.drop_run(x, states, slots[: x.shape[0]], A, B, scale, beta, True)


def _like_x(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x)


def _save_stream(
    hidden: Tensor, residual: Tensor, states: Tensor, site: int, slots: Tensor
) -> None:
    kernels.save_stream(hidden, residual, states, site, slots[: hidden.shape[0]])


def _save_changes(
    hidden: Tensor, residual: Tensor, states: Tensor, gates: Tensor, slots: Tensor
) -> None:
    kernels.save_changes(hidden, residual, states, gates, slots[: hidden.shape[0]])


def _nothing(*args: object) -> None:
    return None


def _register(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(f"{name}{signature}")
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"lora_drop::{name}", fake, lib=_LIBRARY)


_register(
    "drop_run",
    "(Tensor x, Tensor? states, Tensor slots, Tensor A, Tensor B, float scale, float beta, "
    "Tensor? after) -> Tensor",
    _drop_run,
    _like_x,
)
_register(
    "drop_run_back",
    "(Tensor x, Tensor(a!) states, Tensor slots, Tensor A, Tensor B, float scale, float beta, "
    "Tensor? after) -> Tensor",
    _drop_run_back,
    _like_x,
)
_register(
    "save_stream",
    "(Tensor hidden, Tensor residual, Tensor(a!) states, int site, Tensor slots) -> ()",
    _save_stream,
    _nothing,
)
_register(
    "save_changes",
    "(Tensor hidden, Tensor residual, Tensor(a!) states, Tensor gates, Tensor slots) -> ()",
    _save_changes,
    _nothing,
)

drop_run = torch.ops.lora_drop.drop_run  # a run of layers, stacked
drop_run_back = torch.ops.lora_drop.drop_run_back
save_stream = torch.ops.lora_drop.save_stream
save_changes = torch.ops.lora_drop.save_changes
