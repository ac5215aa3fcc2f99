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


def _save_input(hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor) -> None:
    kernels.save_input(hidden, residual, state, slots[: hidden.shape[0]])


def _save_output(
    hidden: Tensor, residual: Tensor, state: Tensor, slots: Tensor, gate: Tensor | None
) -> None:
    kernels.save_output(hidden, residual, state, slots[: hidden.shape[0]], gate)


def _save_between(
    hidden: Tensor, residual: Tensor, done: Tensor, gate: Tensor, next: Tensor, slots: Tensor
) -> None:
    kernels.save_between(hidden, residual, done, gate, next, slots[: hidden.shape[0]])


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
    "save_input",
    "(Tensor hidden, Tensor residual, Tensor(a!) state, Tensor slots) -> ()",
    _save_input,
    _nothing,
)
_register(
    "save_output",
    "(Tensor hidden, Tensor residual, Tensor(a!) state, Tensor slots, Tensor? gate) -> ()",
    _save_output,
    _nothing,
)
_register(
    "save_between",
    "(Tensor hidden, Tensor residual, Tensor(a!) done, Tensor gate, Tensor(b!) next, Tensor slots)"
    " -> ()",
    _save_between,
    _nothing,
)

drop_run = torch.ops.lora_drop.drop_run  # a run of layers, stacked
drop_run_back = torch.ops.lora_drop.drop_run_back
save_input = torch.ops.lora_drop.save_input
save_output = torch.ops.lora_drop.save_output
save_between = torch.ops.lora_drop.save_between
