"""Figures from a profile and from a training log; needs matplotlib, of the extra `train`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_drop_vllm.training.profiler import HORIZON, Profile


def require_matplotlib(flag: str = "--plots") -> None:
    """Raise ValueError where figures, which `flag` asks for, cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{flag}: matplotlib is not installed; pip install 'lora_drop_vllm[train]', or leave "
            f"{flag} out"
        )


def plot_profile(profile: Profile, folder: Path) -> None:
    """`distances.png` like Fig. 1, `layers.png` like Fig. 4, and by KL `runs.png`."""
    figure, (left, right) = _figure(2, (9, 3.5))
    left.plot(profile.distances, profile.mean_curve(), marker="o")
    left.axhline(HORIZON, linestyle=":", color="grey")
    left.set(xlabel="token distance", ylabel="cosine similarity, mean of all layers")
    horizons = [profile.horizon(row) for row in profile.similarity]
    right.bar(range(len(horizons)), horizons)
    right.set(xlabel="layer", ylabel=f"similarity horizon (at least {HORIZON})")
    _save(figure, folder / "distances.png")
    figure, (axes,) = _figure(1, (6, 4))
    for distance, curve in zip(profile.distances, zip(*profile.similarity)):
        axes.plot(range(len(curve)), curve, marker=".", label=f"distance {distance}")
    axes.set(xlabel="layer", ylabel="cosine similarity")
    axes.legend()
    _save(figure, folder / "layers.png")
    if profile.runs is None:
        return
    figure, (axes,) = _figure(1, (6, 4))
    for count in sorted({run.count for run in profile.runs}):
        runs = [run for run in profile.runs if run.count == count]
        axes.plot(
            [run.first for run in runs],
            [run.kl for run in runs],
            marker=".",
            label=f"{count} layers" if count > 1 else "the layer alone",
        )
    axes.set(xlabel="first layer that drops", ylabel="KL to the base model, nats", yscale="log")
    axes.legend()
    _save(figure, folder / "runs.png")


def plot_training(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """Losses and learning rate over the steps of a training log."""
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
    """KV saved against rho, a curve for every k (Fig. 3).

    Args:
        curves: k to (rho, share saved) by Eq. 15
        measured: (k, rho, share saved) at the block pool
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
