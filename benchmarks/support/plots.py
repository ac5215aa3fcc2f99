"""Figures from the records of serve_latency.py. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from support.serve_figures import QUANTILES

Record = dict[str, Any]
KINDS = {"lora": "LoRA", "full": "full"}


def require_matplotlib() -> None:
    """Exits with the way out if figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            "no figure can be drawn, because matplotlib is not installed; "
            "pip install 'lora_drop_vllm[bench]'"
        )


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draws all figures that these records of serve_latency.py allow; returns the files."""
    found = []
    sizes = ("model", "concurrency", "context")
    for key, group in _grouped(records, *sizes, "rho", "k"):
        found.append(_save(folder, "steps", key, lambda axes, g=group: _steps(axes, g[-1])))
    for key, group in _grouped(records, *sizes):
        if len({r["settings"]["rho"] for r in group}) > 1:
            found.append(_save(folder, "speed_up", key, lambda axes, g=group: _speed_up(axes, g)))
        saved = [r for r in group if "kv_saved" in r["metrics"]]
        if saved:
            found.append(_save(folder, "kv_saving", key, lambda axes, g=saved: _kv(axes, g)))
    return found


def _steps(axes: Any, record: Record) -> None:
    """Cumulative distribution of token latency by kind of step: the two modes of Eq. 11."""
    for kind, times in record["metrics"]["by_kind_ms"].items():
        axes.step(times, [q / 100 for q in QUANTILES], where="post", label=f"{KINDS[kind]} steps")
    axes.axvline(
        record["metrics"]["p50_ms"]["stock"], color="grey", linestyle=":", label="stock vLLM, p50"
    )
    axes.set(xlabel="time of a token, ms", ylabel="share of the steps", ylim=(0, 1))


def _speed_up(axes: Any, records: Sequence[Record]) -> None:
    """Speed-up against rho for each k, and the ideal."""
    for (k,), group in _grouped(records, "k"):
        points = sorted((r["settings"]["rho"], r["metrics"]) for r in group)
        rhos = [rho for rho, _ in points]
        (line,) = axes.plot(rhos, [m["speed_up"] for _, m in points], marker="o", label=f"k = {k}")
        ideal = [m.get("ideal_speed_up", float("nan")) for _, m in points]
        axes.plot(rhos, ideal, linestyle=":", color=line.get_color())
    axes.set(xlabel="ρ", ylabel="speed-up over stock vLLM (dotted: ideal)")


def _kv(axes: Any, records: Sequence[Record]) -> None:
    """KV saving of a lone request against Eq. 15."""
    ideal = [r["metrics"]["kv_saved_ideal"] for r in records]
    axes.plot([0, max(ideal)], [0, max(ideal)], linestyle=":", color="grey", label="Eq. 15")
    for r, x in zip(records, ideal, strict=True):
        s = r["settings"]
        axes.plot([x], [r["metrics"]["kv_saved"]], "o", label=f"ρ = {s['rho']}, k = {s['k']}")
    axes.set(xlabel="saving by Eq. 15, prompt included", ylabel="measured")


def _grouped(records: Iterable[Record], *names: str) -> list[tuple[tuple[Any, ...], list[Record]]]:
    def key(r: Record) -> tuple[Any, ...]:
        return tuple(r["settings"][name] for name in names)

    found = [r for r in records if r["benchmark"] == "serve_latency"]
    return [(k, list(group)) for k, group in itertools.groupby(sorted(found, key=key), key)]


def _save(folder: Path, name: str, key: tuple[Any, ...], plot: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    plot(axes)
    axes.set_title(_title(*key), fontsize="small")
    axes.legend(fontsize="small")
    path = folder / (re.sub(r"[^\w.]+", "_", "_".join(map(str, (name, *key)))) + ".png")
    figure.savefig(path, dpi=150)
    return path


def _title(model: str, requests: int, context: int, *rho_and_k: float) -> str:
    at = [f"{model}, {requests} × {context} prompt tokens"]
    return ", ".join(at + [f"{n} = {v}" for n, v in zip(("ρ", "k"), rho_and_k)])
