"""When layers drop: the kind of each engine step, and each request's place in its cycle.

No other code decides a step's kind. This code knows no engine: the scheduler hook tells it what
was scheduled, and sends the resulting `StepPlan` to the workers.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

PROMPTS = ("wait", "now")  # what arriving prompts do: wait for the next full step, or make one
CHUNKED_WAIT = 2  # steps; the fewest that a prompt of several chunks takes


class StepKind(enum.Enum):
    """The kind of a step: all layers run (`FULL`), or drop layers run the update (`LORA`)."""

    FULL = "full"
    LORA = "lora"


@dataclass(frozen=True, slots=True)
class RequestPhase:
    """What the decision of a step's kind needs to know of one scheduled request."""

    has_prompt_tokens: bool
    phase: int  # LoRA steps since its last full step
    k: int


def step_kind(requests: Iterable[RequestPhase]) -> StepKind:
    """Kind of the next engine step for a batch (Sec. II-B, per batch instead of per token).

    Full as soon as one request brings prompt tokens or has used up its k LoRA steps.
    """
    due = any(r.has_prompt_tokens or r.phase >= r.k for r in requests)
    return StepKind.FULL if due else StepKind.LORA


def prompts_wait(running: Collection[RequestPhase], waited: int, most: int) -> bool:
    """Tells whether waiting prompts leave the coming step to the running requests.

    They do while it is a LoRA step without them. A prompt that has begun makes the step full, so
    the others join it; so do they when a request is due for a refresh, or when nobody decodes.

    Args:
        running: the requests that the step schedules, besides those that wait
        waited: steps that the longest waiting prompt has been left out of
        most: steps that it may be left out of (`longest_wait`)
    """
    return bool(running) and waited < most and step_kind(running) is StepKind.LORA


def longest_wait(k: int, fits: bool) -> int:
    """The most steps that a prompt waits for a full step: k, and less where it needs several steps.

    A prompt of n > 1 chunks takes n full steps once it has begun. After at most two LoRA steps
    of waiting that makes no more than 2 n steps, of which none is longer than those n.

    Args:
        k: the served k
        fits: whether one step takes all waiting prompts whole
    """
    return k if fits else min(k, CHUNKED_WAIT)


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a step, as the workers need it.

    Attributes:
        slot: the request's row in the state buffers
        cache_len: tokens in the drop layers' compacted KV list before the step
        num_tokens: query tokens of the request in this step
    """

    slot: int
    cache_len: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step: its kind, decided once, and its rows by request id."""

    kind: StepKind
    rows: Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request as scheduled for one step, with tokens [position, position + num_tokens)."""

    request_id: str
    position: int
    num_tokens: int


@dataclass(slots=True)
class StepTotals:
    """Totals since start-up; KV slots are counted once for all drop layers, not per layer."""

    full_steps: int = 0
    lora_steps: int = 0
    prompt_steps: int = 0  # full steps with tokens of a prompt
    kv_slots_written: int = 0
    kv_slots_skipped: int = 0


@dataclass(slots=True)
class _Tracked:
    slot: int
    k: int
    prompt_end: int  # positions below it are (re)computed as a prompt
    phase: int = 0
    holes: int = 0  # decoded tokens without a slot in the drop layers' KV list


@dataclass
class PhaseTracker:
    """The phase, state slot and KV holes of each request from admission to release.

    Args:
        max_requests: number of requests that may run at once, and of state slots
        kv_skips: whether LoRA steps leave holes in the drop layers' KV (`kv: skip`)
    """

    max_requests: int
    kv_skips: bool
    totals: StepTotals = field(default_factory=StepTotals)
    _tracked: dict[str, _Tracked] = field(default_factory=dict)
    _free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_slots = list(reversed(range(self.max_requests)))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

    def admit(self, request_id: str, k: int, prompt_end: int) -> None:
        """Starts a request, or restarts it: phase 0, no holes, a state slot of its own.

        Its tokens up to `prompt_end` are known by now, so they are computed as a prompt.
        """
        assert request_id not in self._tracked, f"{request_id} was admitted twice"
        self._tracked[request_id] = _Tracked(self._free_slots.pop(), k, prompt_end)

    def release(self, request_id: str) -> None:
        """Forgets a request that ended or was preempted; unknown ids are ignored."""
        if tracked := self._tracked.pop(request_id, None):
            self._free_slots.append(tracked.slot)

    def holes(self, request_id: str) -> int:
        """Number of the request's tokens without a KV slot in the drop layers."""
        tracked = self._tracked.get(request_id)
        return tracked.holes if tracked else 0

    def prompt_end(self, request_id: str, default: int) -> int:
        """End of the positions computed as a prompt; `default` if the request is not admitted."""
        tracked = self._tracked.get(request_id)
        return tracked.prompt_end if tracked else default

    def phase(self, request_id: str, *, in_prompt: bool) -> RequestPhase:
        """What a running request brings to the coming step; `in_prompt`: a chunk of its prompt."""
        tracked = self._tracked[request_id]
        return RequestPhase(in_prompt, tracked.phase, tracked.k)

    def advance(self, scheduled: Iterable[Scheduled]) -> StepPlan:
        """Decides the kind of a step, plans its rows and advances each request's phase."""
        batch = [(s, self._tracked[s.request_id]) for s in scheduled]
        # several tokens can only come from a prompt, whatever the engine calls them
        phases = [
            RequestPhase(s.position < t.prompt_end or s.num_tokens != 1, t.phase, t.k)
            for s, t in batch
        ]
        kind = step_kind(phases)
        rows = {s.request_id: Row(t.slot, s.position - t.holes, s.num_tokens) for s, t in batch}
        if not batch:
            return StepPlan(kind, rows)
        num_tokens = sum(s.num_tokens for s, _ in batch)
        lora = kind is StepKind.LORA
        for _, tracked in batch:
            tracked.phase = tracked.phase + 1 if lora else 0
            tracked.holes += int(lora and self.kv_skips)
        self.totals.full_steps += not lora
        self.totals.lora_steps += lora
        self.totals.prompt_steps += any(phase.has_prompt_tokens for phase in phases)
        if lora and self.kv_skips:
            self.totals.kv_slots_skipped += num_tokens
        else:
            self.totals.kv_slots_written += num_tokens
        return StepPlan(kind, rows)
