"""LoRA-Drop's counters, on their way from the scheduler's process to the server's `/metrics`.

They travel in `SchedulerStats.waiting_lora_adapters`, a dict of integers that vLLM reads only with
`--enable-lora`, which LoRA-Drop refuses. vLLM gives each step's stats to one of its API servers
(`--api-server-count`), and Prometheus adds up what the servers counted. A report therefore holds
the growth since the last report, not the totals.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_drop_vllm.method.schedule import StepTotals

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

_PREFIX = "lora_drop_"
BLOCKS = "kv_blocks"
COUNTERS = {
    "full_steps": "Engine steps in which every layer ran.",
    "lora_steps": "Engine steps in which the drop layers ran the low-rank update instead.",
    "prompt_steps": "Full steps that held tokens of a prompt.",
    "kv_slots_written": "KV slots that each drop layer wrote.",
    "kv_slots_skipped": "KV slots that each drop layer left out and the stock model would write.",
}


def attach(
    stats: SchedulerStats, totals: StepTotals, reported: StepTotals, num_blocks: int
) -> None:
    """Adds the growth of the totals since the last report to the scheduler's stats."""
    before = asdict(reported)
    values = {name: value - before[name] for name, value in asdict(totals).items()}
    values[BLOCKS] = num_blocks
    stats.waiting_lora_adapters = {_PREFIX + name: value for name, value in values.items()}


def read(stats: SchedulerStats) -> dict[str, int]:
    """The report in the stats, by name without prefix; empty where there is none."""
    return {
        key.removeprefix(_PREFIX): value
        for key, value in stats.waiting_lora_adapters.items()
        if key.startswith(_PREFIX)
    }
