"""The README's picture: speed-up over KL to the base model. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from support.overview import K, Point, digest

COLOURS = {0.25: "#1b9e8a", 0.5: "#2667a8", 0.75: "#7b4fa3"}
GREY = "#4d5156"
INK = "#202124"


def draw(shown: list[Point], path: Path) -> None:
    """Our settings on the left, the peers on the right, over one scale of speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for rho, colour in COLOURS.items():
        _draw_rho(left, colour, [p for p in shown if p.rho == rho])
    _draw_peers(right, [p for p in shown if p.group == "peer"])
    left.set(xlim=(-0.12, 2.62), ylim=(0.96, 1.88), ylabel="speed-up over stock vLLM")
    right.set(xlim=(-0.15, 3.5))
    title = {"loc": "left", "fontsize": 10.5, "color": INK, "pad": 10}
    left.set_title("Settings: speed of the engine alone, KL on wikitext-2", **title)
    right.set_title("Peers: served in one run, KL on Python's manual", **title)
    left.yaxis.set_major_formatter("{x:.1f}x")
    for axes in (left, right):
        axes.set_xlabel("KL to the base model, nats per token")
        axes.grid(color="#e8eaed", linewidth=0.8)
        axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0, colors=GREY)
    left.legend(
        handles=_legend(), loc="upper left", bbox_to_anchor=(0.02, 1), frameon=False, fontsize=9.5
    )
    _save(figure, path, digest(shown))


def _save(figure: Any, path: Path, description: str) -> None:
    """Writes a PNG of 64 colours, a third of the size of one in full colour."""
    from PIL import Image, PngImagePlugin

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    said = PngImagePlugin.PngInfo()
    said.add_text("Description", description)
    few = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, pnginfo=said, optimize=True)


def _draw_rho(axes: Any, colour: str, shown: list[Point]) -> None:
    """The fitted adapters of one rho over k, and what training makes of one of them."""
    fits = [p for p in shown if p.group == "fitted"]
    kl, speed = [p.kl for p in fits], [p.speed_up for p in fits]
    around = [[abs(p.speed_up - p.interval[end]) for p in fits] for end in (0, 1)]
    axes.errorbar(kl, speed, around, color=colour, alpha=0.35, linewidth=1.6, elinewidth=1.2)
    axes.plot(kl, speed, "o", color=colour, markersize=6.5, markerfacecolor="white", mew=1.7)
    name = f"ρ = {fits[0].rho}"
    if fits[0].rho == max(COLOURS):
        _label(axes, name, fits[-1], (-12, -4), colour, ha="right", fontweight="bold")
        for p in fits:
            _label(axes, p.label, p, (9, -8), colour, ha="left", fontsize=9)
    else:
        _label(axes, name, fits[0], (14, -18), colour, ha="left", fontweight="bold")
    for p in (p for p in shown if p.group == "trained"):
        start = next(fit for fit in fits if fit.label == f"k = {K}")
        arrow = {"arrowstyle": "->", "color": colour, "linestyle": ":", "shrinkA": 6, "shrinkB": 8}
        axes.annotate("", (p.kl, p.speed_up), xytext=(start.kl, start.speed_up), arrowprops=arrow)
        axes.plot(p.kl, p.speed_up, "*", color=colour, markersize=16, zorder=3)
        _label(axes, p.label, p, (-10, 6), colour, ha="right")


def _draw_peers(axes: Any, shown: list[Point]) -> None:
    for i, p in enumerate(shown):
        ours = p.label.startswith("LoRA-Drop")
        colour, marker, size = (COLOURS[0.25], "*", 16) if ours else (GREY, "s", 7)
        axes.plot(p.kl, p.speed_up, marker, color=colour, markersize=size)
        above = sum(p.kl == q.kl and abs(p.speed_up - q.speed_up) < 0.03 for q in shown[:i])
        far = p.kl > 2
        offset = (4, 10) if far else (11, 2 + 14 * above)
        _label(axes, p.label, p, offset, colour, ha="right" if far else "left")


def _label(
    axes: Any, text: str, at: Point, offset: tuple[float, float], colour: str, **look: Any
) -> None:
    look = {"ha": "center", "fontsize": 10} | look
    place = {"xytext": offset, "textcoords": "offset points"}
    axes.annotate(text, (at.kl, at.speed_up), color=colour, **place, **look)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(marker: str, label: str, **look: Any) -> Any:
        return Line2D([], [], linestyle="none", marker=marker, color=GREY, label=label, **look)

    return [
        entry("*", f"trained adapter, k = {K}", markersize=13),
        entry("o", "fitted adapter, k = 1, 2, 3, 5", markerfacecolor="white", mew=1.7),
    ]
