"""Figures of docs/quality.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_drop_vllm.plots import plot_saving

Record = dict[str, Any]


def draw_kl_over_kv(kinds: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """KL to the base model over KV saved: points of (saved, KL), a curve for each kind of drop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, points in kinds.items():
        if points:
            axes.plot(*zip(*sorted(points)), marker="o", label=kind)
    axes.set(xlabel="KV saved by Eq. 15", ylabel="KL to the base model, nats per token")
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_saving(records: Sequence[Record], path: Path) -> None:
    """KV saved at the pool beside Eq. 15 (Fig. 3)."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for r in records:
        s = r["settings"]
        curves.setdefault(s["k"], []).append((s["rho"], r["metrics"]["equation_15"]))
    held = [(r["settings"]["k"], r["settings"]["rho"], r["metrics"]["saved"]) for r in records]
    plot_saving(curves, held, path)


def draw(records: Sequence[Record], across: str, curve: str, path: Path) -> None:
    """Perplexity over one setting, with a curve for each value of another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for value in sorted({r["settings"][curve] for r in records}):
        own = [r for r in records if r["settings"][curve] == value]
        axes.plot(
            [r["settings"][across] for r in own],
            [r["metrics"]["all"]["perplexity"] for r in own],
            marker="o",
            label=f"{curve} = {value}",
        )
    for base in {r["metrics"]["all"]["base_perplexity"] for r in records}:
        axes.axhline(base, linestyle=":", color="grey", label="base model")
    axes.set(xlabel=across, ylabel="perplexity")
    axes.legend()
    figure.savefig(path, dpi=110)
