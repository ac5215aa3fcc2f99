"""Figures from plain numbers; they need matplotlib from the extra `train`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def require_matplotlib(flag: str = "--plots") -> None:
    """Raises ValueError if matplotlib is missing, which the flag `flag` needs."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{flag}: matplotlib is not installed; pip install 'lora_drop_vllm[train]', or leave "
            f"{flag} out"
        )


def plot_distances(
    curve: Mapping[int, float], horizons: Sequence[int], least: float, path: Path
) -> None:
    """Draws similarity by token distance, and each layer's similarity horizon (Fig. 1).

    Args:
        curve: distance to cosine similarity, the mean of all layers
        horizons: the horizon of each layer
        least: the least similarity within a horizon
    """
    figure, (left, right) = _figure(2, (9, 3.5))
    left.plot([*curve], [*curve.values()], marker="o")
    left.axhline(least, linestyle=":", color="grey")
    left.set(xlabel="token distance", ylabel="cosine similarity, mean of all layers")
    right.bar(range(len(horizons)), horizons)
    right.set(xlabel="layer", ylabel=f"similarity horizon (at least {least})")
    _save(figure, path)


def plot_layers(similarity: Mapping[int, Sequence[float]], path: Path) -> None:
    """Draws similarity by layer, one curve per token distance (Fig. 4)."""
    figure, (axes,) = _figure(1, (6, 4))
    for distance, curve in similarity.items():
        axes.plot(range(len(curve)), curve, marker=".", label=f"distance {distance}")
    axes.set(xlabel="layer", ylabel="cosine similarity")
    axes.legend()
    _save(figure, path)


def plot_runs(runs: Mapping[int, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draws the KL of runs of layers that drop, one curve per length: (first layer, KL)."""
    figure, (axes,) = _figure(1, (6, 4))
    for count, points in sorted(runs.items()):
        label = f"{count} layers" if count > 1 else "the layer alone"
        axes.plot(*zip(*points), marker=".", label=label)
    axes.set(xlabel="first layer that drops", ylabel="KL to the base model, nats", yscale="log")
    axes.legend()
    _save(figure, path)


def plot_training(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws losses and learning rate over the steps of a training log."""
    figure, (left, right) = _figure(2, (9, 3.5))
    steps = [entry["step"] for entry in log]
    for name in ("loss", "ce", "kl", "hidden"):
        left.plot(steps, [entry[name] for entry in log], label=name)
    left.set(xlabel="step", ylabel="per token")
    left.legend()
    right.plot(steps, [entry["lr"] for entry in log])
    right.set(xlabel="step", ylabel="learning rate")
    _save(figure, path)


def plot_saving(
    curves: Mapping[int, Sequence[tuple[float, float]]],
    measured: Sequence[tuple[int, float, float]],
    path: Path,
) -> None:
    """Draws the KV saved against rho, one curve per k (Fig. 3).

    Args:
        curves: k to (rho, share saved) by Eq. 15
        measured: (k, rho, share saved), counted at the block pool
    """
    figure, (axes,) = _figure(1, (6, 4))
    for number, (k, points) in enumerate(sorted(curves.items())):
        rhos, shares = zip(*sorted(points))
        axes.plot(rhos, [100 * s for s in shares], color=f"C{number}", label=f"k = {k}, Eq. 15")
        held = [(rho, 100 * share) for of, rho, share in measured if of == k]
        if held:
            axes.plot(*zip(*held), "x", color=f"C{number}", label=f"k = {k}, counted at the pool")
    axes.set(xlabel="rho, share of the eligible layers that drop", ylabel="KV saved, %")
    axes.legend()
    _save(figure, path)


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
