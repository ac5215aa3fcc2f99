"""The tensor-parallel test's probe in each worker process."""

from __future__ import annotations

from typing import Any


class Probe:
    """A class that `worker_extension_cls` mixes into the workers."""

    model_runner: Any

    def watch_collectives(self) -> None:
        """Counts all-reduces by kind of step from now on."""
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        reduce = group._all_reduce_out_place
        self.reduced = {"full": 0, "lora": 0}

        def counting(*args: Any) -> Any:
            self.reduced[self.model_runner.model.lora_drop.kind.value] += 1
            return reduce(*args)

        group._all_reduce_out_place = counting

    def witness(self) -> dict[str, Any]:
        """Steps and all-reduces by kind, and the sum of the states, to compare the workers."""
        step = self.model_runner.model.lora_drop
        return {
            "steps": {kind.value: n for kind, n in step.counts.items()},
            "reduced": self.reduced,
            "states": step.states.sum().item(),
        }
