"""States and KV slots of a full step, the operators, the launch table, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    RUN_LAUNCHES,
    TOL,
    bf16_is_rounded_to_nearest,  # noqa: F401
    drop_run,
    drop_update,
    frame_is_intact,
    framed,
    make_inputs,
    one_layer,
    triton_state,
    with_update,
)
from torch import Tensor

from lora_drop_vllm import kernels
from lora_drop_vllm.kernels import ops, reference
from lora_drop_vllm.kernels.heuristics import Chain, Launch, run_launch, update_launch

triton_slots = pytest.importorskip("lora_drop_vllm.kernels.triton_slots")
NAN = float("nan")


@pytest.mark.parametrize(("T", "d"), [(1, 64), (9, 100), (4, 2049)])
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("sites", [1, 3])
@pytest.mark.parametrize("run", [reference, triton_state], ids=["reference", "triton"])
def test_states_of_a_full_step(T: int, d: int, dtype: torch.dtype, sites: int, run: Any) -> None:
    """First the streams before the sites are saved, then their changes; nothing else changes."""
    save_stream, save_changes = (
        getattr(run, name, None) or getattr(run, f"{name}_triton")
        for name in ("save_stream", "save_changes")
    )
    slots = torch.randperm(T + 3, device=DEVICE)[:T]
    slots[1::3] = -1
    owned = slots >= 0
    streams = [torch.randn(T, d, device=DEVICE).to(dtype) for _ in range(sites + 1)]
    for stream in streams:
        stream[~owned] = NAN
    states = framed(torch.full((sites, T + 3, d), NAN, device=DEVICE, dtype=dtype))
    for site in range(sites):
        save_stream(streams[site], states, site, slots)
        assert torch.equal(states[site][slots[owned]], streams[site][owned])
    gates = torch.rand(sites, d, device=DEVICE).to(dtype)
    save_changes(streams[-1], states, gates, slots)
    x = [stream.float() for stream in streams]
    for site in range(sites):
        want = (gates[site].float() * (x[site + 1] - x[site])).to(dtype)
        assert torch.equal(states[site][slots[owned]], want[owned])
    unowned = sorted(set(range(T + 3)) - set(slots.tolist()))
    assert states[:, unowned].isnan().all() and frame_is_intact(states)


@pytest.mark.parametrize("run", ["reference", "triton"])
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize(
    ("lens", "cached", "tail"),
    [
        ([1], [0], 0),
        ([1, 1, 1, 0, 0], [5, 47, 48, 0, 0], 4),
        ([2100, 3, 1], [0, 100, 31], 1500),
        ([0, 0], [0, 0], 3),
    ],
    ids=["one", "decode", "prefill", "nothing"],
)
def test_compact_slots(
    lens: list[int], cached: list[int], tail: int, block_size: int, run: str
) -> None:
    def ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    blocks = max(-(-(a + b) // block_size) for a, b in zip(lens, cached)) + 1
    table = torch.randperm(len(lens) * blocks).view(len(lens), blocks)
    total = sum(lens)
    slots = ints([-7] * (total + tail), torch.int64)
    seq_lens = ints([-7] * len(lens))
    starts = ints([sum(lens[:i]) for i in range(len(lens) + 1)])
    # a wider table, like vLLM's: what follows a request's last block must not matter
    wide = ints(torch.cat([table, torch.full((len(lens), 5), -(10**6))], 1).tolist())
    table_view = wide[:, : blocks + 2]
    compact = {
        "reference": reference.compact_slots,
        "triton": triton_slots.compact_slots_triton,
    }[run]
    compact(starts, ints(cached), table_view, slots, seq_lens, block_size)
    want = [
        int(table[q, entry // block_size]) * block_size + entry % block_size
        for q, (length, before) in enumerate(zip(lens, cached))
        for entry in range(before, before + length)
    ]
    assert slots.tolist() == want + [-1] * tail
    assert seq_lens.tolist() == [a + b for a, b in zip(lens, cached)]


def test_an_empty_batch_is_no_error() -> None:
    given = one_layer(make_inputs(1, 64, 4, torch.float32))
    run = make_inputs(1, 64, 4, torch.float32, layers=2)
    empty, no_slots, states = given["x"][:0], given["slots"][:0], run["states"]
    none = {"x": empty, "slots": no_slots}
    for update in (reference.drop_update, drop_update):
        assert update(**with_update(given | none)).shape == (0, 64)
    for update in (reference.drop_run, drop_run):
        assert update(**with_update(run | none)).shape == (0, 64)
    triton_state.save_stream_triton(empty, states, 0, no_slots)
    triton_state.save_changes_triton(empty, states, states[:, 0], no_slots)


def test_the_launch_table() -> None:
    def update(rows: int, d: int, r: int) -> Launch:
        return update_launch(rows, d, r, itemsize=2)

    assert not update(1, 4096, 16).split and update(1, 4096, 16).block_rows == 1
    assert update(5, 4096, 16).split and update(5, 4096, 16).block_rows == 16
    assert update(1, 4096, 64).split and update(1, 4096, 64).block_rows == 1
    assert isinstance(run_launch(14, 64, 2048, 16, itemsize=2), Chain)
    assert isinstance(run_launch(14, 65, 2048, 16, itemsize=2), Launch)
    assert isinstance(run_launch(23, 1, 5120, 16, itemsize=2), Chain)
    assert isinstance(run_launch(14, 1, 8192, 16, itemsize=2), Launch)
    assert run_launch(1, 1, 2048, 16, itemsize=2) == update(1, 2048, 16)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("r", [1, 16, 17, 128])
@pytest.mark.parametrize("d", [16, 577, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 4, 5, 64, 300])
def test_every_launch_of_the_table_can_be_compiled(
    rows: int, d: int, r: int, itemsize: int
) -> None:
    launches = [update_launch(rows, d, r, itemsize), run_launch(2, rows, d, r, itemsize)]
    for launch in launches:
        sizes = [getattr(launch, name) for name in type(launch).__slots__]
        assert all(size > 0 and size & (size - 1) == 0 for size in sizes if size is not False)
        if isinstance(launch, Launch):
            assert launch.block_rows in (1, 16) and launch.block_k >= 16
            assert not launch.split or launch.block_k == launch.block_d


def op_arguments(name: str) -> tuple[Any, ...]:
    given = make_inputs(3, 32, 4, torch.float32, layers=2)
    x, slots = given["x"].nan_to_num(), torch.cat([given["slots"], given["slots"]])
    states = given["states"].nan_to_num()
    if name.startswith("drop_run"):
        return (x, states, slots, given["A"], given["B"], 0.5, 1.0, x)
    gates = torch.rand(2, 32, device=DEVICE)
    starts, lens, table = (torch.arange(n, device=DEVICE, dtype=torch.int32) for n in (4, 3, 3))
    return {
        "save_stream": (x, states, 1, slots),
        "save_changes": (x, states, gates, slots),
        "compact_slots": (starts, lens, table[:, None], slots.clone(), lens.clone(), 7),
    }[name]


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_operators(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.lora_drop, name).default, op_arguments(name))
    for device in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_drop::{name}", device)


def test_operators_without_state() -> None:
    x, _, *rest = op_arguments("drop_run")
    torch.library.opcheck(torch.ops.lora_drop.drop_run.default, (x, None, *rest))


def test_operators_take_the_whole_slot_buffer() -> None:
    x, states, slots, A, B, scale, beta, _ = op_arguments("drop_run_back")
    want_states = states.clone()
    want = reference.drop_run(x, want_states, slots[:3], reference.Update(A, B, scale, beta, True))
    got = ops.drop_run_back(x, states, slots, A, B, scale, beta, None)
    owned = slots[:3] >= 0
    torch.testing.assert_close(got[owned], want[owned])
    torch.testing.assert_close(states, want_states)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_both_implementations_of_an_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA side runs Triton, takes the same arguments and has the same effect."""

    def outcome(run: Any) -> list[Tensor]:
        torch.manual_seed(1)
        given = op_arguments(name)
        result = run(*given)
        if result is not None:  # rows that own no slot hold no meaning
            result = result[given[2][: len(result)] >= 0]
        return [value for value in (*given, result) if isinstance(value, Tensor)]

    operator = ops.OPERATORS[name]
    want = outcome(operator.cpu)
    monkeypatch.setattr(reference, operator.kernel, lambda *_: pytest.fail("not by Triton"))
    torch.testing.assert_close(outcome(operator.cuda), want)


def test_triton_is_imported_with_the_first_cuda_tensor() -> None:
    script = (
        "import sys, torch\n"
        "from lora_drop_vllm import kernels\n"
        "x = torch.ones(1, 4)\n"
        "states = torch.zeros(1, 1, 4)\n"
        "kernels.save_stream(x, states, 0, torch.zeros(1, dtype=torch.int64))\n"
        "assert states.tolist() == [[[1.0] * 4]], states\n"
        "print([name for name in sys.modules if 'kernels.triton' in name])\n"
        "kernels.ops.triton_kernels()\n"
        "print('lora_drop_vllm.kernels.triton_run' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "True"], done.stderr


def test_importing_the_triton_kernels_leaves_the_package_functions_alone() -> None:
    ops.triton_kernels()
    for name in ops.OPERATORS:
        assert getattr(kernels, name) is getattr(torch.ops.lora_drop, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_cuda_tensors_take_the_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = ops.OPERATORS[name].kernel
    monkeypatch.setattr(reference, kernel, lambda *_: pytest.fail("not by Triton"))
    getattr(kernels, name)(*op_arguments(name))


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("d", [576, 4096])
@pytest.mark.parametrize("T", [1, 4, 33])
def test_replaying_a_cuda_graph(T: int, d: int, layers: int) -> None:
    """A captured update uses what its buffers hold at the replay: slots, states and x."""
    given = make_inputs(T, d, 16, torch.bfloat16, layers=layers)
    x, state, slots, A, B = (given[key].nan_to_num() for key in ("x", "states", "slots", "A", "B"))
    call = ops.drop_run_back
    arguments = (x, state, slots, A, B, 0.5, 0.0, None)
    call(*arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*arguments)
    for shift in (1, 2):
        slots.copy_((torch.arange(T, device="cuda") + shift) % (T + 3))
        slots[1::5] = -1
        state.copy_(torch.randn_like(state))
        x.copy_(torch.randn_like(x))
        want_state = state.clone()
        want = reference.drop_run(x, want_state, slots, reference.Update(A, B, 0.5, 0.0, True))
        graph.replay()
        owned = slots >= 0
        torch.testing.assert_close(out[owned], want[owned], **TOL[torch.bfloat16])
        torch.testing.assert_close(state, want_state, **TOL[torch.bfloat16])


@pytest.mark.gpu
def test_sanitized_kernels() -> None:
    """Every kernel once, on odd sizes; run it under compute-sanitizer."""
    given = make_inputs(17, 577, 17, torch.bfloat16, layers=2)
    for launch in RUN_LAUNCHES.values():
        drop_run(**with_update(given, writes_back=True), launch=launch)
    x, states, slots = given["x"], given["states"], given["slots"]
    triton_state.save_stream_triton(x, states, 1, slots)
    triton_state.save_changes_triton(x, states, torch.ones_like(states[:, 0]), slots)
    starts, lens, table = (torch.arange(n, device=DEVICE, dtype=torch.int32) for n in (18, 17, 17))
    compact = triton_slots.compact_slots_triton
    compact(starts, lens, table[:, None].expand(17, 3).contiguous(), slots, lens.clone(), 7)
    torch.cuda.synchronize()


def test_op_latency_checks_the_kernels_without_a_gpu() -> None:
    script = Path(__file__).parents[2] / "benchmarks/op_latency.py"
    done = subprocess.run(
        [sys.executable, str(script), "--interpret"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
