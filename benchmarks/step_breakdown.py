"""Parts of a step's time on the CPU, from a torch.profiler trace.

One engine in this process decodes under LoRA-Drop, another as stock vLLM. Parts that both have
should cost the same in both. What a LoRA step spends beyond that, and on the drop layers, is its
gap to the ideal, in which the drop layers are free. The profiler slows everything down, so the time
of a step without it is recorded as well.

    python benchmarks/step_breakdown.py
    python benchmarks/step_breakdown.py --model 1b --batch 4 --trace DIR
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import record, tables
from support.engines import SHAPES, lora_drop, make_shape, quiet

PREFIX = "part: "
STEP = "rest of the step"
ALWAYS_ON, DROP, SAVING = "always-on layers", "drop layers", "saving states"
PARTS = (
    ALWAYS_ON,
    DROP,
    SAVING,
    "embedding, last norm",
    "logits",
    "sampling, output",
    "attention metadata",
    "inputs",
    "scheduler",
    STEP,
)
EDGE = 4  # steps left out at both ends: the prompt's, and those that only hand out


@dataclass(frozen=True)
class Span:
    """One profiled call of a part; milliseconds from an arbitrary start."""

    part: str
    start: float
    end: float


def own_times(spans: Iterable[Span]) -> list[dict[str, float]]:
    """Time of each part in each step, without the other parts inside of it."""
    steps: list[dict[str, float]] = []
    inside: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while inside and inside[-1].end <= span.start:
            inside.pop()
        if span.part == STEP:
            steps.append(defaultdict(float))
        elif not inside:
            continue  # outside of all steps
        else:
            steps[-1][inside[-1].part] -= span.end - span.start
        steps[-1][span.part] += span.end - span.start
        inside.append(span)
    return [{part: step.get(part, 0.0) for part in PARTS} for step in steps]


def gap(lora: dict[str, float], full: dict[str, float]) -> dict[str, float]:
    """Cost of each part of a LoRA step beyond the ideal, in which D is free."""
    free = (DROP, SAVING)
    return {part: lora[part] - (0.0 if part in free else full[part]) for part in PARTS}


def annotate(owner: Any, method: str, part: str) -> None:
    """Shows the calls of a method to the profiler as a part."""
    from torch.profiler import record_function

    call: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(call)
    def annotated(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return call(*args, **kwargs)

    # past nn.Module, which would refuse to hold a function where it has a module
    owner.__dict__[method] = annotated


def annotate_engine(engine: Any) -> None:
    """Marks all parts of an engine in this process."""
    core = engine.engine_core.engine_core
    runner = engine.model_executor.driver_worker.worker.model_runner
    for method in ("schedule", "update_from_output"):
        annotate(core.scheduler, method, "scheduler")
    annotate(runner, "execute_model", "inputs")
    annotate(runner, "_build_attention_metadata", "attention metadata")
    annotate(runner, "sample_tokens", "sampling, output")
    annotate(runner.model, "forward", "embedding, last norm")
    annotate(runner.model, "compute_logits", "logits")
    for layer in runner.model.model.layers:
        drops = hasattr(layer, "lora_step")
        annotate(layer, "forward", DROP if drops else ALWAYS_ON)
        if drops:
            annotate(layer, "lora_step", DROP)
    for kept in {layer.kept for layer in runner.model.model.layers if hasattr(layer, "kept")}:
        annotate(kept, "take", SAVING)
    annotate(engine, "step", STEP)


def decode(engine: Any, given: argparse.Namespace) -> tuple[list[str], list[float]]:
    """Decodes one batch; returns kind and milliseconds of every step."""
    from vllm import SamplingParams

    tracker = getattr(engine.engine_core.engine_core.scheduler, "tracker", None)
    params = SamplingParams(temperature=0, max_tokens=given.tokens, ignore_eos=True)
    for n in range(given.batch):
        engine.add_request(str(n), {"prompt_token_ids": [7 + n] * given.prompt}, params)
    kinds, times = [], []
    while engine.has_unfinished_requests():
        before = tracker.totals.lora_steps if tracker else 0
        start = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - start))
        ran = tracker is not None and tracker.totals.lora_steps > before
        kinds.append("lora" if ran else "full")
    return kinds, times


def profile(model: Path, settings: dict[str, Any] | None, given: argparse.Namespace) -> Any:
    """Median own time of each part by kind of step, and of the step without the profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from vllm import LLM

    llm = LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=True,
        max_model_len=given.prompt + given.tokens,
        max_num_seqs=given.batch,
        kv_cache_memory_bytes=1 << 28,
        **lora_drop(settings),
    )
    engine = llm.llm_engine
    decode(engine, given)
    kinds, plain = decode(engine, given)
    annotate_engine(engine)
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        profiled_kinds, _ = decode(engine, given)
    if given.trace:
        found.export_chrome_trace(str(given.trace / f"{'lora_drop' if settings else 'stock'}.json"))
    spans = [
        Span(e.name.removeprefix(PREFIX), e.time_range.start / 1000, e.time_range.end / 1000)
        for e in found.events()
        if e.name.startswith(PREFIX)
    ]
    engine.engine_core.shutdown()
    return _by_kind(profiled_kinds, own_times(spans)), _by_kind(kinds, [{"": t} for t in plain])


def _by_kind(kinds: list[str], steps: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median of each part over the steps of each kind."""
    found = {}
    for kind in set(kinds):
        own = [s for k, s in list(zip(kinds, steps, strict=True))[EDGE:-EDGE] if k == kind]
        found[kind] = {part: statistics.median(s[part] for s in own) for part in own[0]}
    return found


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The metrics of the record.

    Raises:
        RuntimeError: no LoRA step ran.
    """
    ours = {"untrained": True, "rho": given.rho, "k": given.k}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_shape(Path(scratch) / "model", given.model)
        stock, plain_stock = profile(model, None, given)
        found, plain = profile(model, ours, given)
    if "lora" not in found:
        raise RuntimeError("no LoRA step ran: the drop path was not executed")
    beyond = gap(found["lora"], found["full"])
    ideal = sum(found["lora"].values()) - sum(beyond.values())
    parts = {"stock": stock["full"], "full": found["full"], "lora": found["lora"], "gap": beyond}
    unprofiled = {"stock": plain_stock["full"][""], "full": plain["full"][""]}
    return {name: {p: round(t, 3) for p, t in of.items()} for name, of in parts.items()} | {
        "ideal_lora_step_ms": round(ideal, 3),
        "unprofiled_step_ms": {
            name: round(t, 3) for name, t in (unprofiled | {"lora": plain["lora"][""]}).items()
        },
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="135m", help="shape, dummy weights")
    add("--rho", type=float, default=0.5)
    add("--k", type=int, default=3)
    add("--batch", type=int, default=1, help="requests at once")
    add("--prompt", type=int, default=64, help="prompt tokens")
    add("--tokens", type=int, default=65, help="generated tokens of each request")
    add("--trace", type=Path, help="folder for the traces, to look at in Perfetto")
    given = parser.parse_args(argv)
    if given.tokens < 4 * EDGE + 2 * (given.k + 1):
        parser.error(f"--tokens {given.tokens}: too few for two cycles of --k {given.k}")
    return given


def main() -> int:
    """Profiles, prints and records."""
    given = parse()
    quiet()
    import torch

    if torch.cuda.is_available():
        raise SystemExit("a GPU is here: this takes the CPU's step apart; hide it and try again")
    if given.trace:
        given.trace.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(given).items() if name != "trace"}
    try:
        written = record.write("step_breakdown", settings, run(given))
    except RuntimeError as error:
        record.write("step_breakdown", settings, {}, str(error))
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(json.dumps(written["metrics"], indent=2))
    print(tables.of([written]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
