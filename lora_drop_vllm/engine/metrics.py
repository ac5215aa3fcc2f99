"""LoRA-Drop's counters at `/metrics`, from the scheduler's process to the server's.

They ride in `SchedulerStats.waiting_lora_adapters`, a dict of integers that vLLM only reads with
`--enable-lora`, which LoRA-Drop refuses. vLLM gives each step's stats to one of its API servers
(`--api-server-count`), and Prometheus adds up what the servers counted; so what rides along is what
was added since the last report, not the totals.

Patches `StatLoggerManager.__init__` to add our logger, and only in engines served with
`--model-impl lora_drop`. Reason: the entry point `vllm.stat_logger_plugins` would switch
statistics on in every vLLM of the environment, also where LoRA-Drop is not used. Removal
condition: vLLM lets an engine's config name stat loggers.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any

from lora_drop_vllm.method.schedule import StepTotals

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

_PREFIX = "lora_drop_"
BLOCKS = "kv_blocks"
COUNTERS = {
    "full_steps": "Engine steps in which every layer ran.",
    "lora_steps": "Engine steps in which the drop layers ran the low-rank update instead.",
    "prompt_steps": "Full steps that held tokens of a prompt.",
    "kv_slots_written": "KV slots written by a drop layer (the same for each of them).",
    "kv_slots_skipped": "KV slots a drop layer did not write, which the stock model would have.",
}


def attach(
    stats: SchedulerStats, totals: StepTotals, reported: StepTotals, num_blocks: int
) -> None:
    """Put what the totals grew by since those reported aboard the scheduler's stats."""
    before = asdict(reported)
    values = {name: value - before[name] for name, value in asdict(totals).items()}
    values[BLOCKS] = num_blocks
    stats.waiting_lora_adapters = {_PREFIX + name: value for name, value in values.items()}


def read(stats: SchedulerStats) -> dict[str, int]:
    """What is aboard, by name without prefix; empty when there is nothing."""
    return {
        key.removeprefix(_PREFIX): value
        for key, value in stats.waiting_lora_adapters.items()
        if key.startswith(_PREFIX)
    }


def install() -> None:
    """Add the LoRA-Drop logger to this process's engines; calling it twice is harmless."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    original = StatLoggerManager.__init__
    if getattr(original, "lora_drop", False):
        return

    @wraps(original)
    def init(self: StatLoggerManager, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from lora_drop_vllm.engine.activation import MODEL_IMPL
        from lora_drop_vllm.engine.stat_logger import LoRADropStatLogger

        original(self, vllm_config, *args, **kwargs)
        if vllm_config.model_config.model_impl == MODEL_IMPL:
            self.stat_loggers.append(LoRADropStatLogger(vllm_config, self.engine_indexes))

    init.lora_drop = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = init
