"""The picture of serving under load: TPOT, TTFT and share of LoRA steps over the rate."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.load.figures import VARIANTS
from support.load.tables import whole_pool

Record = dict[str, Any]

LOOKS = {  # of a variant: label, colour, marker
    "stock": ("stock vLLM", "#4d5156", "s"),
    "now": ("LoRA-Drop, prompts: now", "#c4622d", "o"),
    "wait": ("LoRA-Drop, prompts: wait", "#2667a8", "*"),
}
PANELS = {  # figure: title and factor
    "tpot_mean_ms": ("mean time per output token, ms", 1.0),
    "ttft_p99_ms": ("time to first token, p99, s", 1e-3),
    "lora_share": ("LoRA steps, % of all steps", 100.0),
}


def shown() -> list[Record]:
    """The records that the picture shows: of each shape the one with most rates."""
    found: dict[tuple[str, int, int], Record] = {}
    for r in whole_pool():
        shape = r["settings"]["model"], r["settings"]["prompt"], r["settings"]["tokens"]
        if len(r["metrics"]["rates"]) >= len(found.get(shape, r)["metrics"]["rates"]):
            found[shape] = r
    return list(found.values())


def digest(records: Sequence[Record]) -> str:
    """Fingerprint of the figures of the picture; the file carries it."""
    figures = json.dumps([r["metrics"]["rates"] for r in records], sort_keys=True)
    return hashlib.sha256(figures.encode()).hexdigest()


def draw(records: Sequence[Record], path: Path) -> None:
    """Draws one row of panels per record. Needs matplotlib (extra `bench`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 2.9 * len(records)), layout="constrained")
    grid = figure.subplots(len(records), len(PANELS), squeeze=False)
    for row, r in zip(grid, records, strict=True):
        for axes, (name, (title, factor)) in zip(row, PANELS.items(), strict=True):
            _panel(axes, r, name, factor)
            axes.set_title(title, fontsize=9.5)
        s = r["settings"]
        row[0].set_ylabel(f"{s['model']}\n{s['prompt']} + {s['tokens']} tokens", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, metadata={"Description": digest(records)})


def _panel(axes: Any, r: Record, name: str, factor: float) -> None:
    """One figure over the rate; small markers are the rounds, lines join their means."""
    rates = r["metrics"]["rates"]
    at = [rate["requests_per_s"] for rate in rates]
    for variant in VARIANTS:
        if name not in rates[0][variant]:
            continue
        label, colour, marker = LOOKS[variant]
        rounds = [[factor * v for v in rate[variant][name]] for rate in rates]
        means = [statistics.fmean(values) for values in rounds]
        size = 10 if marker == "*" else 5
        axes.plot(at, means, marker=marker, color=colour, label=label, markersize=size)
        for x, values in zip(at, rounds, strict=True):
            axes.plot([x] * len(values), values, ".", color=colour, alpha=0.45, markersize=4)
    axes.axvline(r["metrics"]["saturation"], color="#4d5156", linewidth=1, linestyle=":")
    axes.set_xlabel("requests/s (dotted: stock vLLM is saturated)", fontsize=8)
    axes.set_ylim(bottom=0, top=100 if name == "lora_share" else None)
    axes.grid(color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors="#4d5156", labelsize=8.5)
