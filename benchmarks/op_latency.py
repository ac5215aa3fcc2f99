"""Time of the update kernels on a CUDA GPU, beside the least that it could be.

Each case is first checked against the reference; a wrong kernel is not timed. Times are per update
or run in a CUDA graph of many, median over rounds. Each of them has an A and B of its own, and the
L2 cache is cleared before each replay: in a model, the other layers' weights have passed through it
when a layer's turn comes. `--hot` leaves the weights in the cache.

The bound is the time to copy as many bytes as must be read and written, or an empty kernel's launch
if that takes longer. The alternatives to the launch table's choice are timed as well, to set the
table in kernels/heuristics.py from them.

    python benchmarks/op_latency.py
    python benchmarks/op_latency.py --d 4096 --r 16 32 --rows 1 8 128 --layers 1 14
    python benchmarks/op_latency.py --interpret      the check alone, small, without a GPU
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from support import record
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from lora_drop_vllm.kernels.heuristics import Chain, Launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RULE = dict(scale=0.5, beta=1.0, writes_back=False)  # `update`
FLUSH_BYTES = 256 << 20  # several times the L2
SIZES = ((4096, 16), (2048, 16), (8192, 16), (4096, 64))  # d, r


@dataclass(frozen=True)
class Case:
    """One update, or a run of several layers."""

    d: int
    r: int
    rows: int
    layers: int
    dtype: torch.dtype

    def __str__(self) -> str:
        what = "update" if self.layers == 1 else f"run of {self.layers}"
        return f"{what}, d={self.d} r={self.r} rows={self.rows} {str(self.dtype)[6:]}"

    def bytes(self) -> int:
        """Bytes that must pass through memory: A, B and states, x in and out."""
        numbers = self.layers * (2 * self.d * self.r + self.rows * self.d) + 2 * self.rows * self.d
        return numbers * self.dtype.itemsize

    def inputs(self, sets: int, device: str) -> list[dict[str, Tensor]]:
        """Weights and states of `sets` updates or runs, with one x and slots for all."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(self.dtype)

        layers, d, r = self.layers, self.d, self.r
        shared = dict(x=normal(self.rows, d), slots=torch.arange(self.rows, device=device).flip(0))
        return [
            shared
            | dict(
                states=normal(layers, self.rows, d) / layers,
                A=normal(layers, r, d) / d**0.5,
                B=normal(layers, d, r) / r**0.5 / layers,
            )
            for _ in range(sets)
        ]


def launches(case: Case) -> list[Chain | Launch]:
    """The table's choice first, then its alternatives."""
    from lora_drop_vllm.kernels import heuristics
    from lora_drop_vllm.kernels.heuristics import Launch

    d, r, rows, itemsize = case.d, case.r, case.rows, case.dtype.itemsize
    block_k = heuristics.one_launch(rows, d, r, itemsize).block_k
    found = [heuristics.run_launch(case.layers, rows, d, r, itemsize)]
    if case.layers > 1:
        chain = heuristics.chain_launch(d, r, itemsize)
        found += [chain, replace(chain, warps=8)]
    for block_d in (64, 128, 256):
        if rows <= 16:
            found.append(Launch(False, 1, block_d, block_k, 8))
            found.append(Launch(True, 1, block_d, block_d, 4))
        if rows > 1:
            found.append(Launch(True, 16, block_d, block_d, 8))
            found.append(Launch(False, 16, 2 * block_d, max(16, min(block_k // 4, 512)), 8))
    return list(dict.fromkeys(found))


def describe(launch: Chain | Launch) -> str:
    """Short name of a launch: its kind, and its sizes in the order of its fields."""
    kind, *sizes = (type(launch).__name__.lower(), *astuple(launch))
    if kind == "launch":
        kind = "split" if sizes.pop(0) else "one"
    return f"{kind} {'/'.join(map(str, sizes))}"


def kernel(given: dict[str, Tensor], launch: Chain | Launch) -> Tensor:
    """Result of a case by Triton."""
    from lora_drop_vllm.kernels.reference import Update
    from lora_drop_vllm.kernels.triton_run import drop_run_triton
    from lora_drop_vllm.kernels.triton_update import drop_update_triton

    x, states, slots = (given[name] for name in ("x", "states", "slots"))
    update = Update(given["A"], given["B"], **RULE)
    if len(states) > 1:
        return drop_run_triton(x, states, slots, update, launch=launch)
    return drop_update_triton(x, states[0], slots, update.layer(0), launch=launch)


def reference(given: dict[str, Tensor]) -> Tensor:
    """Result of a case by the reference, in fp32."""
    from lora_drop_vllm.kernels.reference import Update, drop_run

    x, states, slots = (given[name] for name in ("x", "states", "slots"))
    return drop_run(x, states, slots, Update(given["A"], given["B"], **RULE))


def unfused(given: dict[str, Tensor]) -> Tensor:
    """Result of a case by a pair of matmuls and elementwise kernels."""
    x = given["x"]
    for state, a, b in zip(given["states"], given["A"], given["B"]):
        x = x + state[given["slots"]] + RULE["scale"] * torch.mm(torch.mm(x, a.T), b.T)
    return x


def check(case: Case, device: str) -> None:
    """Exits naming case and launch if a result differs from the reference's."""
    (given,) = case.inputs(1, device)
    want = reference(given)
    # in a run, elements that round the other way carry on to the later layers
    tolerance = TOLERANCE[case.dtype] * (1 if case.layers == 1 else 3)
    for launch in launches(case):
        try:
            got = kernel(given, launch)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            sys.exit(f"{case}: {describe(launch)} is wrong\n{error}")


def graph_time(calls: list[Callable[[], Any]], rounds: int, flush: Tensor | None = None) -> float:
    """Microseconds per call in a CUDA graph of all calls; median over rounds."""
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.sum()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[2:])


def floors(count: int, rounds: int) -> dict[str, float]:
    """Lower bounds of any kernel: the launch of an empty Triton kernel, and copying the bytes."""
    import triton

    @triton.jit
    def empty_kernel(x_ptr):
        pass

    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_us = graph_time([lambda: target.copy_(source)], rounds)
    empty_us = graph_time([lambda: empty_kernel[(1,)](source)] * count, rounds)
    return {"empty_launch_us": round(empty_us, 3), "copy_bytes_per_us": round(2 * 2**30 / copy_us)}


def measure(case: Case, floor: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """All times of one case, and their ratios."""
    count = max(8, arguments.launches // case.layers)
    sets = case.inputs(1 if arguments.hot else count, "cuda") * (count if arguments.hot else 1)
    flush = None if arguments.hot else torch.zeros(FLUSH_BYTES // 4, device="cuda")

    def timed(call: Callable[..., Any], *rest: Any) -> float:
        calls = [lambda given=given: call(given, *rest) for given in sets]
        return round(graph_time(calls, arguments.rounds, flush), 3)

    alternatives = tqdm(launches(case), desc=str(case), leave=False)
    times = {describe(launch): timed(kernel, launch) for launch in alternatives}
    chosen, best = next(iter(times)), min(times, key=times.__getitem__)
    ours = times[chosen]
    bound = max(case.bytes() / floor["copy_bytes_per_us"], floor["empty_launch_us"])
    return {
        "case": str(case),
        "kernel_us": ours,
        "bound_us": round(bound, 3),
        "kernel_over_bound": round(ours / bound, 2),
        "kernel_over_empty": round(ours / floor["empty_launch_us"], 2),
        "reference_over_kernel": round(timed(reference) / ours, 2),
        "unfused_over_kernel": round(timed(unfused) / ours, 2),
        "chosen": chosen,
        "best": best,
        "chosen_over_best": round(ours / times[best], 2),
        "launches_us": times,
    }


def show(results: list[dict[str, Any]], floor: dict[str, float]) -> None:
    """Prints the results as a table."""
    print(
        f"empty launch {floor['empty_launch_us']:.2f} us, "
        f"copy {floor['copy_bytes_per_us'] / 1e6:.2f} TB/s\n"
        f"{'':44}{'us':>8}{'/bound':>8}{'/empty':>8}{'ref/':>7}{'unfused/':>10}  launch"
    )
    for m in results:
        best = "" if m["best"] == m["chosen"] else f", {m['chosen_over_best']}x that of {m['best']}"
        print(
            f"{m['case']:44}{m['kernel_us']:8.2f}{m['kernel_over_bound']:8.2f}"
            f"{m['kernel_over_empty']:8.2f}{m['reference_over_kernel']:7.2f}"
            f"{m['unfused_over_kernel']:10.2f}  {m['chosen']}{best}"
        )


def parse() -> tuple[argparse.Namespace, list[Case]]:
    """The settings and their cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, nargs="+", help="hidden sizes, each with every --r")
    parser.add_argument("--r", type=int, nargs="+", default=[16], help="ranks, each with every --d")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 14], help="1: no run")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--launches", type=int, default=100, help="updates in a graph")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hot", action="store_true", help="weights stay in the L2 cache")
    parser.add_argument("--interpret", action="store_true", help="check only, tiny, on the CPU")
    arguments = parser.parse_args()
    if arguments.interpret:
        tiny = [(48, 3, 1, 1), (577, 3, 2, 1), (48, 3, 18, 1), (48, 4, 2, 3)]
        return arguments, [Case(*sizes, torch.float32) for sizes in tiny]
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --interpret checks the kernels without one")
    sizes = itertools.product(arguments.d, arguments.r) if arguments.d else SIZES
    grid = itertools.product(arguments.layers, sizes, arguments.rows)
    dtype = getattr(torch, arguments.dtype)
    return arguments, [Case(d, r, rows, layers, dtype) for layers, (d, r), rows in grid]


def main() -> None:
    """Checks, times, prints and records."""
    arguments, cases = parse()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel
    torch.manual_seed(0)
    for case in tqdm(cases, desc="check"):
        check(case, "cpu" if arguments.interpret else "cuda")
    if arguments.interpret:
        print(f"{len(cases)} cases as the reference has them")
        return
    floor = floors(arguments.launches, arguments.rounds)
    results = [measure(case, floor, arguments) for case in tqdm(cases, desc="time")]
    show(results, floor)
    record.write("op_latency", vars(arguments), floor | {"cases": results})


if __name__ == "__main__":
    main()
