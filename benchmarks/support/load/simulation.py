"""Runs of vLLM's real scheduler under load, with a clock and a cost model instead of a machine."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from lora_drop_vllm.engine.scheduler import LoRADropScheduler
from lora_drop_vllm.method.schedule import StepKind
from support.load.client import Offer, Run, Shape
from support.load.cost_model import Machine, Model, Step
from support.load.dry_core import Core, make_scheduler

TOKEN = 7  # of every prompt and every answer


@dataclass(frozen=True)
class Arrival:
    """A request: when it arrives (s), and its tokens."""

    at: float
    prompt: int
    tokens: int


def arrivals(shape: Shape, offer: Offer, spread: float = 0.0) -> list[Arrival]:
    """The requests of an offer, as vLLM's client would send them.

    Args:
        spread: lengths are drawn evenly from 1 - spread to 1 + spread times the shape's
    """
    rng = random.Random(f"{offer.seed} {offer.requests}")
    rate = offer.rate
    gaps = [rng.expovariate(1.0) if rate else 0.0 for _ in range(offer.requests)]
    # vLLM's client scales the gaps so that the last request comes when the rate says
    scale = offer.requests / rate / sum(gaps) if rate else 0.0

    def length(mean: int) -> int:
        return max(round(mean * rng.uniform(1 - spread, 1 + spread)), 2)

    return [
        Arrival(at * scale, length(shape.prompt), length(shape.tokens))
        for at in itertools.accumulate(gaps)
    ]


@dataclass
class _Answer:
    """A request under way; times are in seconds, and None until the first token came."""

    arrived: float
    tokens: int
    first: float | None = None


@dataclass(frozen=True)
class _InFlight:
    """A scheduled step, what it samples, and when it ends."""

    output: Any
    sampled: ModelRunnerOutput
    end: float


class Engine:
    """An engine core whose steps take the time that the cost model says.

    Args:
        prepared: `dry_core.prepare`
        core: its settings; two block sizes mean LoRA-Drop
    """

    def __init__(self, prepared: Any, core: Core, machine: Machine, model: Model) -> None:
        self.drops = len(core.block_sizes) > 1
        kind = LoRADropScheduler if self.drops else AsyncScheduler
        self.scheduler, _ = make_scheduler(prepared, kind, core)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.depth = 1 + bool(core.scheduling["async_scheduling"])
        self.machine, self.model = machine, model
        self.clock = self.busy_until = 0.0
        self.answers: dict[str, _Answer] = {}
        self.in_flight: deque[_InFlight] = deque()
        self.counts = {"steps": 0, "preemptions": 0}
        self.kv_used: list[float] = []
        self.ttft_ms: list[float] = []
        self.tpot_ms: list[float] = []

    def serve(self, coming: Sequence[Arrival], at_once: int | None = None) -> Run:
        """Answers all requests, in the order of their arrival.

        Args:
            at_once: most requests under way; the client holds the others back
        """
        waiting = deque(coming)
        while waiting or self.answers:
            while waiting and self._arrives(waiting[0], at_once):
                name = str(len(coming) - len(waiting))
                self._add(name, waiting.popleft(), self.clock if at_once else None)
            if not self._step():
                self.clock = waiting[0].at
        if self.drops:
            totals = self.scheduler.tracker.totals
            self.counts |= {"full": totals.full_steps, "lora": totals.lora_steps}
            self.counts["prompt"] = totals.prompt_steps
        tokens = sum(arrival.tokens for arrival in coming)
        figures = (self.ttft_ms, self.tpot_ms, [], self.clock, tokens / self.clock)
        return Run(*figures, self.counts, self.kv_used)

    def _arrives(self, arrival: Arrival, at_once: int | None) -> bool:
        return len(self.answers) < at_once if at_once else arrival.at <= self.clock

    def _add(self, name: str, arrival: Arrival, sent: float | None) -> None:
        params = SamplingParams(max_tokens=arrival.tokens, ignore_eos=True)
        self.scheduler.add_request(Request(name, [TOKEN] * arrival.prompt, params, None))
        self.answers[name] = _Answer(arrival.at if sent is None else sent, arrival.tokens)

    def _step(self) -> bool:
        """Schedules a step, or takes the oldest one's output if it must; False: nothing to do."""
        scheduled = False
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.counts["preemptions"] += len(output.preempted_req_ids or ())
            if scheduled := output.total_num_scheduled_tokens > 0:
                self._run(output)
            else:
                self.scheduler.update_from_output(output, ModelRunnerOutput([], {}, []))
        if self.in_flight and (len(self.in_flight) == self.depth or not scheduled):
            self._take(self.in_flight.popleft())
            return True
        return scheduled

    def _run(self, output: Any) -> None:
        self.counts["steps"] += 1
        self.kv_used.append(self.pool.get_usage())
        seconds = self.machine.seconds(self._work(output), self.model)
        self.busy_until = max(self.clock, self.busy_until) + seconds
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        tokens = [[] if requests[name].is_prefill_chunk else [TOKEN] for name in names]
        sampled = ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, tokens)
        self.in_flight.append(_InFlight(output, sampled, self.busy_until))

    def _work(self, output: Any) -> Step:
        """The work of a step, by its requests and their lengths before it."""
        read = read_drop = 0
        pairs = pairs_drop = 0.0
        rows = output.lora_drop.rows if self.drops else None
        requests = self.scheduler.requests
        for name, count in output.num_scheduled_tokens.items():
            before = requests[name].num_computed_tokens - count
            short = rows[name].cache_len if rows else before
            read += before + count
            read_drop += short + count
            pairs += count * (before + (count + 1) / 2)
            pairs_drop += count * (short + (count + 1) / 2)
        sizes = (output.total_num_scheduled_tokens, len(output.num_scheduled_tokens))
        lora = self.drops and output.lora_drop.kind is StepKind.LORA
        return Step(*sizes, read, read_drop, pairs, pairs_drop, lora)

    def _take(self, step: _InFlight) -> None:
        """Takes the output of a step at its end."""
        self.clock = max(self.clock, step.end)
        found = self.scheduler.update_from_output(step.output, step.sampled)
        for result in found[0].outputs if found else ():
            answer = self.answers[result.request_id]
            if answer.first is None:
                answer.first = self.clock
            if result.finish_reason is not None:
                del self.answers[result.request_id]
                self.ttft_ms.append(1000 * (answer.first - answer.arrived))
                whole = 1000 * (self.clock - answer.first)
                self.tpot_ms.append(whole / (answer.tokens - 1))
