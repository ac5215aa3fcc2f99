"""Kernels under test, sizes, launches, and memory that exposes a wrong read or write."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_drop_vllm.kernels.heuristics import Chain, Launch
from lora_drop_vllm.kernels.reference import Update

drop_update = pytest.importorskip("lora_drop_vllm.kernels.triton_update").drop_update_triton
drop_run = pytest.importorskip("lora_drop_vllm.kernels.triton_run").drop_run_triton
triton_state = pytest.importorskip("lora_drop_vllm.kernels.triton_state")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOL: dict[torch.dtype, dict[str, float]] = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
    torch.bfloat16: dict(rtol=1e-2, atol=1e-2),
}
SIZES = [(1, 64, 4), (19, 100, 16), (3, 577, 1), (5, 96, 128), (2, 1024, 17)]  # T, d, r
RULES = {  # beta, has a state, writes it back
    "previous": (0.0, True, True),
    "anchor": (0.0, True, False),
    "update": (1.0, True, False),
    "none": (1.0, False, False),
}
LAUNCHES = {
    "table": None,
    "one": Launch(split=False, block_rows=1, block_d=256, block_k=512, warps=4),
    "one-dot": Launch(split=False, block_rows=16, block_d=64, block_k=64, warps=4),
    "split": Launch(split=True, block_rows=1, block_d=256, block_k=256, warps=4),
    "split-dot": Launch(split=True, block_rows=16, block_d=64, block_k=64, warps=4),
}
RUN_LAUNCHES = LAUNCHES | {
    "chain": Chain(block_rank=16, warps=4),
    "chain-in-parts": Chain(block_rank=2, warps=4),
}
FRAME = 64


def with_rules(*axes: Any) -> list[Any]:
    """All combinations of the axes; the rules alternate."""
    return [(*case, rule) for case, rule in zip(product(*axes), cycle(RULES))]


def framed(values: Tensor) -> Tensor:
    """The same values, with NaN before and after them in memory."""
    around = torch.full((values.numel() + 2 * FRAME,), float("nan"), dtype=values.dtype)
    inside = around.to(DEVICE)[FRAME:-FRAME].view(values.shape)
    return inside.copy_(values)


def frame_is_intact(values: Tensor) -> bool:
    around = values._base
    assert around is not None
    return bool(around[:FRAME].isnan().all() and around[-FRAME:].isnan().all())


def make_inputs(T: int, d: int, r: int, dtype: torch.dtype, layers: int = 1) -> dict[str, Any]:
    """Inputs of a run; row 1 is padding, and each state that no row owns is NaN."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape)

    x = normal(T, d)
    slots = torch.randperm(T + 3)[:T]
    if T > 1:
        slots[1], x[1] = -1, float("nan")
    states = normal(layers, T + 3, d)
    states[:, [s for s in range(T + 3) if s not in slots.tolist()]] = float("nan")
    A, B = normal(layers, r, d) / d**0.5, normal(layers, d, r) / r**0.5
    framed_ones = {
        name: framed(tensor.to(dtype))
        for name, tensor in dict(x=x, A=A, B=B, states=states).items()
    }
    return framed_ones | {"slots": slots.to(DEVICE)}


def one_layer(given: dict[str, Any]) -> dict[str, Any]:
    return dict(
        x=given["x"],
        state=given["states"][0],
        slots=given["slots"],
        A=given["A"][0],
        B=given["B"][0],
    )


def with_update(
    given: dict[str, Any], scale: float = 0.5, beta: float = 1.0, writes_back: bool = False
) -> dict[str, Any]:
    """The arguments of a kernel, with A and B as part of an update."""
    rest = {name: value for name, value in given.items() if name not in ("A", "B")}
    return rest | {"update": Update(given["A"], given["B"], scale, beta, writes_back)}


@pytest.fixture(autouse=True)
def bf16_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds as a GPU does; Triton's interpreter would cut the last bits off."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source.name, target.name) == ("fp32", "bf16"):
            bits = torch.from_numpy(data.copy()).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16)
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
