"""Triton against the reference at odd sizes, in each dtype, with NaN wherever a read is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    DEVICE,
    LAUNCHES,
    RULES,
    RUN_LAUNCHES,
    SIZES,
    TOL,
    bf16_is_rounded_to_nearest,  # noqa: F401
    drop_run,
    drop_update,
    frame_is_intact,
    framed,
    make_inputs,
    one_layer,
    with_rules,
    with_update,
)
from torch import Tensor

from lora_drop_vllm.kernels import reference
from lora_drop_vllm.kernels.heuristics import Chain, Launch
from lora_drop_vllm.kernels.reference import Update


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("size", "dtype", "launch", "rule"), with_rules(SIZES, TOL, LAUNCHES), ids=str
)
def test_drop_update_matches_reference(
    size: tuple[int, int, int], dtype: torch.dtype, launch: str, rule: str
) -> None:
    T, d, r = size
    beta, stateful, writes_back = RULES[rule]
    given = one_layer(make_inputs(T, d, r, dtype))
    states = [framed(given["state"]) for _ in range(2)]
    out = framed(torch.full((T, d), float("nan"), dtype=dtype))  # an unwritten row must fail
    arguments = with_update(given, beta=beta, writes_back=writes_back)
    want = reference.drop_update(**arguments | {"state": states[0] if stateful else None})
    arguments |= {"state": states[1] if stateful else None}
    got = drop_update(**arguments, out=out, launch=LAUNCHES[launch])
    owned = given["slots"] >= 0
    assert got is out
    torch.testing.assert_close(got[owned], want[owned], **TOL[dtype])
    torch.testing.assert_close(states[1], states[0], equal_nan=True, **TOL[dtype])
    if writes_back:
        assert torch.equal(states[1][given["slots"][owned]], got[owned])
    else:
        torch.testing.assert_close(states[1], given["state"], equal_nan=True, rtol=0, atol=0)
    assert frame_is_intact(out) and frame_is_intact(states[1])


@pytest.mark.parametrize(
    ("T", "d", "r", "dtype", "launch"),
    [
        (2, 8192, 8, torch.bfloat16, None),
        (2, 8192, 128, torch.bfloat16, None),
        (18, 8192, 128, torch.float32, None),
        (3, 2048, 128, torch.float16, Launch(False, 16, 128, 128, 8)),
    ],
)
def test_drop_update_at_its_largest(
    T: int, d: int, r: int, dtype: torch.dtype, launch: Launch | None
) -> None:
    given = one_layer(make_inputs(T, d, r, dtype))
    owned = given["slots"] >= 0
    want = reference.drop_update(**with_update(given))
    got = drop_update(**with_update(given), launch=launch)
    torch.testing.assert_close(got[owned], want[owned], **TOL[dtype])


@pytest.mark.parametrize(
    ("size", "dtype", "launch", "rule"),
    with_rules([(3, 100, 17)], TOL, RUN_LAUNCHES)
    + with_rules([(17, 64, 4)], TOL, ["one-dot", "split-dot"]),
    ids=str,
)
def test_drop_run_matches_reference(
    size: tuple[int, int, int], dtype: torch.dtype, launch: str, rule: str
) -> None:
    T, d, r = size
    beta, stateful, writes_back = RULES[rule]
    given = make_inputs(T, d, r, dtype, layers=3)
    for name in ("x", "states"):  # small, so that one layer's rounding stays below the tolerance
        given[name].mul_(0.25)
    states = [framed(given["states"]) for _ in range(2)]
    x = given["x"].clone()
    arguments = with_update(given | {"x": x}, beta=beta, writes_back=writes_back)
    want = reference.drop_run(**arguments | {"states": states[0] if stateful else None})
    arguments |= {"states": states[1] if stateful else None}
    got = drop_run(**arguments, launch=RUN_LAUNCHES[launch])
    owned = given["slots"] >= 0
    torch.testing.assert_close(got[owned], want[owned], **TOL[dtype])
    torch.testing.assert_close(states[1], states[0], equal_nan=True, **TOL[dtype])
    torch.testing.assert_close(x, given["x"], equal_nan=True, rtol=0, atol=0)
    assert frame_is_intact(states[1])
    if writes_back:
        assert torch.equal(states[1][-1][given["slots"][owned]], got[owned])


@pytest.mark.parametrize("launch", [None, Chain(block_rank=4, warps=16)])
def test_drop_run_at_its_largest(launch: Chain | None) -> None:
    given = make_inputs(2, 8192, 128, torch.float32, layers=2)
    want = reference.drop_run(**with_update(given))
    got = drop_run(**with_update(given), launch=launch)
    torch.testing.assert_close(got[:1], want[:1], **TOL[torch.float32])


@pytest.mark.parametrize("launch", RUN_LAUNCHES)
def test_rows_may_lie_apart_in_memory(launch: str) -> None:
    given = make_inputs(3, 100, 5, torch.float32, layers=2)
    rule, by = dict(beta=0.0, writes_back=True), RUN_LAUNCHES[launch]
    wide = {
        name: torch.full((*given[name].shape[:-1], 107), float("nan")) for name in ("x", "states")
    }
    apart = {name: tensor.to(DEVICE)[..., 3:103] for name, tensor in wide.items()}
    for name, tensor in apart.items():
        tensor.copy_(given[name])
    got = drop_run(**with_update(given | apart, **rule), launch=by)
    want = drop_run(**with_update(given, **rule), launch=by)
    owned = given["slots"] >= 0
    assert torch.equal(got[owned], want[owned])
    torch.testing.assert_close(apart["states"], given["states"], equal_nan=True, rtol=0, atol=0)


def test_a_run_is_a_loop_of_updates_bit_for_bit() -> None:
    given = make_inputs(3, 100, 5, torch.bfloat16, layers=4)
    states = [given["states"].clone() for _ in range(2)]
    update = Update(given["A"], given["B"], scale=0.5, beta=0.0, writes_back=True)
    got = reference.drop_run(given["x"], states[0], given["slots"], update)
    x = given["x"]
    for i in range(4):
        x = reference.drop_update(x, states[1][i], given["slots"], update.layer(i))
    owned = given["slots"] >= 0
    assert torch.equal(got[owned], x[owned])
    assert torch.equal(states[0].nan_to_num(), states[1].nan_to_num())


@pytest.mark.parametrize("launch", RUN_LAUNCHES)
def test_every_layer_of_a_run_is_rounded_once(launch: str) -> None:
    """Integers have exact fp32 sums in any order, so only the place of rounding can differ."""
    layers, T, d, r = 3, 2, 96, 16

    def integers(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape).to(DEVICE, torch.bfloat16)

    def few_ones(*shape: int) -> Tensor:  # no sum gets near the 24 bits of fp32
        return integers(1, *shape) * (torch.rand(shape) < 0.1).to(DEVICE)

    given = dict(x=integers(60, T, d), states=integers(60, layers, T, d))
    given |= dict(A=few_ones(layers, r, d), B=few_ones(layers, d, r))
    given |= dict(slots=torch.arange(T, device=DEVICE))
    arguments = with_update(given, scale=0.125)
    want = reference.drop_run(**arguments)
    assert torch.equal(drop_run(**arguments, launch=RUN_LAUNCHES[launch]), want)
    x = given["x"].float()
    for i in range(layers):  # without rounding in between, the result differs
        low = x @ given["A"][i].float().T
        x = x + given["states"][i] + 0.125 * low @ given["B"][i].float().T
    assert not torch.equal(x.bfloat16(), want)


def test_the_sum_is_rounded_once() -> None:
    """In bf16, one rounding after fp32 accumulation is not the same as one per operation."""
    given = one_layer(make_inputs(1, 256, 16, torch.bfloat16))
    exact = (
        given["x"].double()
        + given["state"][given["slots"]].double()
        + 0.5 * given["x"].double() @ given["A"].double().T @ given["B"].double().T
    )
    got = reference.drop_update(**with_update(given))
    assert torch.equal(got, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_low_is_not_rounded(dtype: torch.dtype, launch: str) -> None:
    """With c_i = -B low and low rounded to the dtype, the result is the rounding error of low."""
    given = one_layer(make_inputs(1, 128, 1, dtype))
    given["B"] = torch.ones_like(given["B"])
    low = given["x"].double() @ given["A"].double().T
    given["state"][given["slots"]] = -low.to(dtype).expand(1, 128)
    got = drop_update(**with_update(given, scale=1.0, beta=0.0), launch=LAUNCHES[launch])
    left = (low - low.to(dtype).double()).expand(1, 128)
    assert left.abs().min() > 0
    torch.testing.assert_close(got.double(), left, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("launch", RUN_LAUNCHES)
def test_two_runs_agree_bit_for_bit(launch: str) -> None:
    given = make_inputs(3, 100, 17, torch.float32, layers=2)
    owned = given["slots"] >= 0
    first, again = (
        drop_run(**with_update(given), launch=RUN_LAUNCHES[launch])[owned] for _ in range(2)
    )
    assert torch.equal(first, again)
