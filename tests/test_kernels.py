"""Triton against the reference: odd sizes, each dtype, NaN where nothing may be read or left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_drop_vllm.kernels import reference

drop_update = pytest.importorskip("lora_drop_vllm.kernels.triton_update")
save_state = pytest.importorskip("lora_drop_vllm.kernels.triton_state")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOL: dict[torch.dtype, dict[str, float]] = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
    torch.bfloat16: dict(rtol=1e-2, atol=1e-2),
}
SIZES = [(1, 64, 4), (7, 100, 16), (3, 577, 1), (5, 96, 128), (2, 1024, 17)]


def make_inputs(T: int, d: int, r: int, dtype: torch.dtype) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    slots = torch.randperm(T + 3, device=DEVICE)[:T]
    if T > 1:
        slots[1] = -1
    state = normal(T + 3, d)
    state[[s for s in range(T + 3) if s not in slots.tolist()]] = float("nan")
    return dict(
        x=normal(T, d),
        state=state,
        slots=slots,
        A=normal(r, d) / d**0.5,
        B=normal(d, r) / r**0.5,
    )


@pytest.mark.parametrize(("T", "d", "r"), SIZES)
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize(
    ("beta", "stateful", "writes_back"),
    [(0.0, True, True), (0.0, True, False), (1.0, True, False), (1.0, False, False)],
    ids=["previous", "anchor", "update", "none"],
)
def test_drop_update_matches_reference(
    T: int,
    d: int,
    r: int,
    dtype: torch.dtype,
    beta: float,
    stateful: bool,
    writes_back: bool,
) -> None:
    given = make_inputs(T, d, r, dtype)
    owned = given["slots"] >= 0
    states = [given["state"].clone() if stateful else None for _ in range(2)]
    rest = {name: given[name] for name in ("slots", "A", "B")}
    want = reference.drop_update(
        given["x"], states[0], **rest, scale=0.5, beta=beta, writes_back=writes_back
    )
    got = drop_update.drop_update_triton(
        given["x"],
        states[1],
        **rest,
        scale=0.5,
        beta=beta,
        writes_back=writes_back,
        out=torch.full_like(given["x"], float("nan")),  # an unwritten row must fail
    )
    torch.testing.assert_close(got[owned], want[owned], **TOL[dtype])
    if stateful:
        torch.testing.assert_close(states[1], states[0], equal_nan=True, **TOL[dtype])
        untouched = torch.ones(len(states[1]), dtype=torch.bool)
        if writes_back:
            untouched[given["slots"][owned]] = False
            torch.testing.assert_close(states[1][given["slots"][owned]], got[owned])
        assert torch.equal(states[1][untouched].isnan(), given["state"][untouched].isnan())


def test_the_sum_is_rounded_once() -> None:
    """In bf16, fp32 accumulation and one rounding is not the same as rounding at each step."""
    given = make_inputs(1, 256, 16, torch.bfloat16)
    exact = (
        given["x"].double()
        + given["state"][given["slots"]].double()
        + 0.5 * given["x"].double() @ given["A"].double().T @ given["B"].double().T
    )
    got = reference.drop_update(**given, scale=0.5, beta=1.0, writes_back=False)
    assert torch.equal(got, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("T", "d"), [(1, 64), (9, 100), (4, 2049)])
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_save_state_matches_reference(T: int, d: int, dtype: torch.dtype, gated: bool) -> None:
    given = make_inputs(T, d, 1, dtype)
    slots = given["slots"].clone()
    slots[::3] = -1
    slots[-1] = given["slots"][-1]
    before, after, residual = (torch.randn(T, d, device=DEVICE).to(dtype) for _ in range(3))
    gate = torch.rand(d, device=DEVICE).to(dtype) if gated else None
    states = [given["state"].clone() for _ in range(2)]
    if gated:
        reference.save_input(before, residual, states[0], slots)
        save_state.save_state_triton(before, residual, states[1], slots, None, difference=False)
    reference.save_output(after, residual, states[0], slots, gate)
    save_state.save_state_triton(after, residual, states[1], slots, gate, difference=gated)
    # a difference of two roundings: the streams' last place, 2^-6 up to 4 in bf16, shows in full
    atol = 2 * 4 * torch.finfo(dtype).eps if gated else TOL[dtype]["atol"]
    torch.testing.assert_close(
        states[1], states[0], equal_nan=True, rtol=TOL[dtype]["rtol"], atol=atol
    )
    owners = slots[slots >= 0]
    change = after[slots >= 0] + residual[slots >= 0]
    if gate is not None:
        start = before[slots >= 0] + residual[slots >= 0]
        change = (gate.float() * (change.float() - start.float())).to(dtype)
    torch.testing.assert_close(states[0][owners], change)


def test_an_empty_batch_is_no_error() -> None:
    given = make_inputs(1, 64, 4, torch.float32)
    empty = given | {"x": given["x"][:0], "slots": given["slots"][:0]}
    for run in (reference.drop_update, drop_update.drop_update_triton):
        assert run(**empty, scale=1.0, beta=1.0, writes_back=False).shape == (0, 64)


@pytest.mark.gpu
def test_cuda_tensors_take_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_drop_vllm import kernels

    calls = []
    monkeypatch.setattr(
        drop_update, "drop_update_triton", lambda *args: calls.append(args) or args[0]
    )
    given = make_inputs(2, 64, 4, torch.float32)
    kernels.drop_update(**given, scale=1.0, beta=1.0, writes_back=False)
    assert calls


def test_importing_the_triton_kernels_leaves_the_package_functions_alone() -> None:
    from lora_drop_vllm import kernels

    assert all(callable(f) for f in (kernels.drop_update, kernels.save_input, kernels.save_output))
