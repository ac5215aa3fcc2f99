"""The Prometheus side of LoRA-Drop's metrics, in the server's process.

Patches `StatLoggerManager.__init__`, which adds our logger to engines served with `--model-impl
lora_drop` and to no others. Reason: the entry point `vllm.stat_logger_plugins` would switch
statistics on in every vLLM of the environment, with or without LoRA-Drop. Removal condition: vLLM
lets an engine's config name stat loggers.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager

from lora_drop_vllm.config import MODEL_IMPL, SETTINGS, LoRADropConfig
from lora_drop_vllm.engine import metrics


class LoRADropStatLogger(AggregateStatLoggerBase):
    """Turns each engine's reports into counters and a gauge beside vLLM's own."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        name = vllm_config.model_config.served_model_name
        self._counters = {
            counter: Counter(f"vllm:lora_drop_{counter}", documentation, labels)
            for counter, documentation in metrics.COUNTERS.items()
        }
        self._blocks = Gauge(
            "vllm:lora_drop_kv_blocks",
            "KV blocks that running requests hold for the drop layers.",
            labels,
            multiprocess_mode="mostrecent",
        )
        served = _served(LoRADropConfig.from_dict(vllm_config.additional_config[SETTINGS]))
        Gauge(
            "vllm:lora_drop_info",
            "The settings that LoRA-Drop serves with, as labels; always 1.",
            ["model_name", *served],
            multiprocess_mode="mostrecent",
        ).labels(name, *served.values()).set(1)
        self._labels = {index: (name, str(index)) for index in engine_indexes}
        for labelled in self._labels.values():  # zero from the start, as Prometheus expects
            for counter in self._counters.values():
                counter.labels(*labelled)
            self._blocks.labels(*labelled).set(0)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Counts one report of an engine."""
        report = metrics.read(scheduler_stats) if scheduler_stats is not None else {}
        if not report:
            return
        labelled = self._labels[engine_idx]
        for name, counter in self._counters.items():
            counter.labels(*labelled).inc(report[name])
        self._blocks.labels(*labelled).set(report[metrics.BLOCKS])

    def log_engine_initialized(self) -> None:
        """Logs nothing: the start-up line has said it."""


def install() -> None:
    """Adds the LoRA-Drop logger to this process's engines; a second call changes nothing."""
    original = StatLoggerManager.__init__
    if getattr(original, "lora_drop", False):
        return

    @wraps(original)
    def init(self: StatLoggerManager, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if vllm_config.model_config.model_impl == MODEL_IMPL:
            self.stat_loggers.append(LoRADropStatLogger(vllm_config, self.engine_indexes))

    init.lora_drop = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = init


def _served(config: LoRADropConfig) -> dict[str, str]:
    """Labels of the gauge that says what is served; of the adapter's path the folder's name."""
    return {
        "adapter": Path(config.adapter).name if config.adapter else "",
        "drop_layers": ",".join(map(str, config.sites.layers)),
        "attention_only": ",".join(map(str, config.sites.attention_only)),
        "num_layers": str(config.num_layers),
        "k": str(config.k),
        "least_k": "none" if config.least_k is None else str(config.least_k),
        "reuse": config.reuse,
        "kv": config.kv,
    }
