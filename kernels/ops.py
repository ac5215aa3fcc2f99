"""The kernels as torch operators, the one dispatcher: the reference on the CPU, Triton on CUDA.

A compiled model calls an operator without looking inside. `after` orders work in a compiled graph:
no update reads it, but the graph keeps what produced it and runs that first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lora_drop_vllm.kernels import reference
from lora_drop_vllm.kernels.reference import Update


@cache
def triton_kernels() -> dict[str, Callable[..., Any]]:
    """The Triton launchers by the names of the functions in `reference`.

    They are imported with the first CUDA tensor: without a GPU, Triton need not be installed.
    """
    from lora_drop_vllm.kernels.triton_run import drop_run_triton
    from lora_drop_vllm.kernels.triton_slots import compact_slots_triton
    from lora_drop_vllm.kernels.triton_state import save_changes_triton, save_stream_triton

    return {
        "drop_run": drop_run_triton,
        "save_stream": save_stream_triton,
        "save_changes": save_changes_triton,
        "compact_slots": compact_slots_triton,
    }


@dataclass(frozen=True)
class Operator:
    """One operator and its implementations.

    Attributes:
        signature: in torch's schema language
        kernel: name of the function in `reference`, and of its Triton launcher
        call: passes the operator's arguments to such a function, its first argument
        fake: makes results of the right shape, for compilers
    """

    signature: str
    kernel: str
    call: Callable[..., Any]
    fake: Callable[..., Any]

    def cpu(self, *arguments: Any) -> Any:
        """Runs the reference."""
        return self.call(getattr(reference, self.kernel), *arguments)

    def cuda(self, *arguments: Any) -> Any:
        """Runs the Triton kernel."""
        return self.call(triton_kernels()[self.kernel], *arguments)


def _drop_run(
    writes_back: bool,
    kernel: Callable[..., Tensor],
    x: Tensor,
    states: Tensor | None,
    slots: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    beta: float,
    after: Tensor | None,
) -> Tensor:
    return kernel(x, states, slots, Update(A, B, scale, beta, writes_back))


def _as_it_is(kernel: Callable[..., None], *arguments: Any) -> None:
    kernel(*arguments)


def _like_x(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x)


def _nothing(*args: object) -> None:
    return None


OPERATORS = {
    "drop_run": Operator(
        "(Tensor x, Tensor? states, Tensor slots, Tensor A, Tensor B, float scale, float beta, "
        "Tensor? after) -> Tensor",
        "drop_run",
        partial(_drop_run, False),
        _like_x,
    ),
    "drop_run_back": Operator(
        "(Tensor x, Tensor(a!) states, Tensor slots, Tensor A, Tensor B, float scale, float beta, "
        "Tensor? after) -> Tensor",
        "drop_run",
        partial(_drop_run, True),
        _like_x,
    ),
    "save_stream": Operator(
        "(Tensor x, Tensor(a!) states, int site, Tensor slots) -> ()",
        "save_stream",
        _as_it_is,
        _nothing,
    ),
    "save_changes": Operator(
        "(Tensor x, Tensor(a!) states, Tensor gates, Tensor slots) -> ()",
        "save_changes",
        _as_it_is,
        _nothing,
    ),
    "compact_slots": Operator(
        "(Tensor starts, Tensor cache_lens, Tensor block_table, Tensor(a!) slots, "
        "Tensor(b!) seq_lens, int block_size) -> ()",
        "compact_slots",
        _as_it_is,
        _nothing,
    ),
}

_LIBRARY = torch.library.Library("lora_drop", "DEF")
for _name, _operator in OPERATORS.items():
    _LIBRARY.define(_name + _operator.signature)
    _LIBRARY.impl(_name, _operator.cpu, "CPU")
    _LIBRARY.impl(_name, _operator.cuda, "CUDA")
    torch.library.register_fake(f"lora_drop::{_name}", _operator.fake, lib=_LIBRARY)

drop_run = torch.ops.lora_drop.drop_run  # a run of layers, stacked
drop_run_back = torch.ops.lora_drop.drop_run_back  # and writes each result back as c_i
save_stream = torch.ops.lora_drop.save_stream
save_changes = torch.ops.lora_drop.save_changes
compact_slots = torch.ops.lora_drop.compact_slots
