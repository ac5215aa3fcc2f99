"""What a worker keeps: the state vectors c_i by request slot, and the current step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from lora_drop_vllm.method.schedule import Row, StepKind, StepPlan


class StepState:
    """States of all drop layers, and a step's plan translated into row indices.

    The buffers are allocated once and written in place, so compiled code may keep references.

    Attributes:
        states: [n_sites, max_requests, d]  c_i of each site by request slot, in the model's dtype;
            a drop layer has one site, or two with `injection: attn_mlp`
        slots: [max_tokens]  the slot that each token row of the step owns, or -1: in a LoRA step
            each row owns its request's slot, in a full step only the request's last row does
        counts: engine steps run by kind, counted where the model is called (the witness that LoRA
            steps really happen)
    """

    def __init__(
        self,
        num_sites: int,
        max_requests: int,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.states = torch.zeros(num_sites, max_requests, hidden_size, dtype=dtype, device=device)
        self.slots = torch.full((max_tokens,), -1, dtype=torch.int64, device=device)
        self.counts = {StepKind.FULL: 0, StepKind.LORA: 0}
        self._plan: StepPlan | None = None
        self._order: Callable[[], Sequence[str]] = tuple
        self._rows: list[Row] | None = None
        self._dirty = 0

    @property
    def kind(self) -> StepKind:
        """Kind of the current step; outside a step (profiling, warm-up) all layers run."""
        return self._plan.kind if self._plan else StepKind.FULL

    @property
    def in_step(self) -> bool:
        """True during a planned step or the rehearsal of one."""
        return self._plan is not None

    def begin(self, plan: StepPlan, order: Callable[[], Sequence[str]]) -> None:
        """Begins a step under its plan.

        Args:
            plan: from the scheduler
            order: returns the request ids in the order of the batch, once the runner has fixed it
        """
        self._plan, self._order, self._rows = plan, order, None

    def rehearse(self, kind: StepKind) -> None:
        """Begins a step of the given kind without requests, to capture a CUDA graph."""
        self._plan, self._rows = StepPlan(kind, {}), []

    def end(self) -> None:
        """Ends the step and drops its plan."""
        self._plan, self._rows = None, None

    def rows(self) -> Sequence[Row]:
        """The planned rows in the order of the batch; none outside a step.

        The first call in a step also sets `slots`; outside a step no row owns a slot.
        """
        if self._plan is None:
            self.slots[: self._dirty].fill_(-1)
            self._dirty = 0
            return ()
        if self._rows is None:
            self._rows = [self._plan.rows[request_id] for request_id in self._order()]
            self._point_slots(self._rows)
        return self._rows

    def ran(self, kind: StepKind) -> None:
        """Counts the current step as run, unless it is a rehearsal.

        Raises:
            RuntimeError: it ran as another kind than planned.
        """
        if not self.rows():
            return
        if kind is not self.kind:
            raise RuntimeError(f"a {self.kind.value} step was run as a {kind.value} step")
        self.counts[kind] += 1

    def _point_slots(self, rows: Sequence[Row]) -> None:
        ends = list(accumulate(row.num_tokens for row in rows))
        count = max(ends[-1], self._dirty)
        host = torch.full((count,), -1, dtype=torch.int64, pin_memory=self.slots.is_cuda)
        host[torch.tensor(ends) - 1] = torch.tensor([row.slot for row in rows])
        self.slots[:count].copy_(host, non_blocking=True)
        self._dirty = ends[-1]
