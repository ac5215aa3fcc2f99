"""Renders the newest quality records into docs/quality.md, as tables and figures.

python benchmarks/quality_tables.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from support import record
from support.accuracy_figures import accuracy_table, draw_accuracy, points
from support.quality_plots import draw, draw_kl_over_kv, draw_saving
from support.quality_records import (
    WINDOWS,
    adapter,
    chats,
    chosen,
    finished,
    fitted,
    last_of_each,
    mixed,
)
from support.question_tables import answers, questions
from support.texts import MANUAL

from lora_drop_vllm.method.cost import kv_saving

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "quality.md"
BEGIN, END = "<!-- rendered by benchmarks/quality_tables.py -->", "<!-- end -->"
NUM_LAYERS = 30  # of the 135M model
MORE_WINDOWS = 64  # on which some adapters were measured again
LOSSES = (0.0125, 0.025)  # of accuracy, whose KL is shown

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str]]

QUALITY: list[Column] = [
    ("perplexity", lambda r: f"{r['metrics']['all']['perplexity']:.1f}"),
    ("at full steps", lambda r: f"{r['metrics']['full']['perplexity']:.1f}"),
    ("at LoRA steps", lambda r: f"{r['metrics']['lora']['perplexity']:.1f}"),
    ("base", lambda r: f"{r['metrics']['all']['base_perplexity']:.1f}"),
    ("KL to base", lambda r: f"{r['metrics']['all']['kl']:.3f}"),
    ("same best token", lambda r: f"{r['metrics']['all']['agreement']:.1%}"),
]


def setting(name: str, heading: str | None = None) -> Column:
    """Column that shows a setting."""
    return heading or name, lambda r: str(r["settings"][name])


ADAPTER: Column = ("adapter", adapter)


def beside(field: str, heading: str, factor: int = 1, form: str = ".3f", unit: str = "") -> Column:
    """Column of a figure of rollouts, with the base model's in brackets."""

    def value(r: Record) -> str:
        figure = r["metrics"]["rollouts"]["figures"][field]
        ours, base = (factor * figure[who]["value"] for who in ("lora_drop", "base"))
        return f"{ours:{form}}{unit} ({base:{form}}{unit})"

    return f"{heading} (base)", value


def more(field: str) -> Column:
    """Column of a share's difference from the base model's, in points, with its interval."""

    def value(r: Record) -> str:
        found = r["metrics"]["rollouts"]["figures"][field]["difference"]
        points, low, high = (100 * found[name] for name in ("value", "low", "high"))
        return f"{points:+.1f} ({low:.1f} to {high:.1f})"

    return "more than base, points", value


def _exact(r: Record) -> str:
    found = r["metrics"].get("exact_lora_steps")
    return f"{found['all']['kl']:.3f}" if found else "–"


EXACT: Column = ("KL if LoRA steps were exact", _exact)
CHAT: list[Column] = [
    ("KL to base", lambda r: f"{r['metrics']['steps']['all']['kl']:.3f}"),
    EXACT,
    ("same best token", lambda r: f"{r['metrics']['steps']['all']['agreement']:.1%}"),
    beside("tokens", "tokens", form=".0f"),
    beside("cut_off", "cut off", 100, ".1f", "%"),
    more("cut_off"),
    beside("loops", "loops", 100, ".1f", "%"),
    more("loops"),
    beside("distinct_3", "distinct-3"),
    beside("logprob", "log-probability"),
    beside("first_choice", "first choice", 100, ".1f", "%"),
]
ORIGIN: list[Column] = [
    ("answers", lambda r: str(r["metrics"]["answers"])),
    ("only LoRA-Drop loops", lambda r: str(r["metrics"]["only_ours_loop"])),
    ("loop begins at token, median", lambda r: str(r["metrics"]["median_start"])),
    ("base loops from there", lambda r: str(r["metrics"]["base_loops_from_ours"])),
    ("base loops from its own text", lambda r: str(r["metrics"]["base_loops_from_own"])),
]


def table(records: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Markdown table, line by line."""
    heads, values = zip(*columns)
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(value(r) for value in values) + " |" for r in records]


def _drop_layers(r: Record) -> str:
    return _numbers(r["metrics"]["drop_layers"])


def _drops(r: Record) -> str:
    only_attention = r["metrics"].get("injection") == "attn"
    return ("attention of " if only_attention else "") + _drop_layers(r)


def _numbers(layers: Sequence[int]) -> str:
    """Ascending numbers as ranges."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(layers), lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if run[1:] else str(run[0]) for run in runs) or "–"


def _speed(r: Record) -> str:
    m = _measured("decode_latency", r, batch=1, prompt=16, injection=None)
    return f"{m['speed_up']:.2f}x of {m['ideal_speed_up']:.2f}x" if m else "–"


def _saved(r: Record) -> str:
    formula = _equation_15(r)
    m = _measured("kv_saving", r, injection=None)
    return f"{m['saved']:.1%} ({formula:.1%})" if m else f"– ({formula:.1%})"


def _equation_15(r: Record) -> float:
    m = r["metrics"]
    drop = len(m["drop_layers"]) + len(m.get("drop_attention", ()))
    return kv_saving(NUM_LAYERS, drop, r["settings"]["k"])


def _measured(benchmark: str, r: Record, **wanted: Any) -> dict[str, Any]:
    """Metrics of the model's shape at the same rho and k; empty without a record."""
    wanted |= {"model": "135m"} | {name: r["settings"][name] for name in ("rho", "k")}
    found = record.latest(benchmark, **wanted)
    return found["metrics"] if found else {}


def _accuracy_over_kl(asked: Sequence[Record]) -> list[str]:
    """Points, lines and figure; nothing without records."""
    found = points(last_of_each(record.newest("accuracy_over_kl")), asked)
    if not found:
        return []
    draw_accuracy(found, DOCS / "quality_accuracy.png")
    lines = ["", "### Accuracy over KL", "", *accuracy_table(found, LOSSES)]
    return [*lines, "", "![questions that change sides over √KL](quality_accuracy.png)"]


def by(*names: str) -> Callable[[Record], list[Any]]:
    """Sorting key of these settings."""
    return lambda r: [r["settings"][name] for name in names]


def sections() -> list[str]:
    """All tables, with their headings."""
    asked = last_of_each([r for r in finished() if r["metrics"]["tasks"]])
    grid = sorted(fitted(), key=by("rho", "k"))
    rank = sorted(fitted(rho=0.25, k=3, rank=None, tokens=None), key=by("tokens", "rank"))
    choice = fitted(rho=0.25, k=3, layers=None)
    injection = fitted(rho=0.5, k=2, injection=None)
    drop = ("drop layers", _drop_layers)
    lines = ["### Adapters of this repository", ""]
    about = [ADAPTER, ("drop layers", _drops), setting("text"), setting("windows")]
    measured = finished(WINDOWS), finished(MORE_WINDOWS), finished(text=MANUAL)
    found = [r for records in measured for r in last_of_each(records)]
    lines += table(found, [*about, *QUALITY, EXACT])
    if answered := chats():
        lines += ["", "### Answers to chat prompts, greedy", ""]
        lines += table(answered, [ADAPTER, *CHAT])
    if origins := last_of_each(record.newest("loop_origin")):
        lines += ["", "### Loops that only LoRA-Drop enters, and who else does from there", ""]
        lines += table(origins, [ADAPTER, *ORIGIN])
    lines += ["", "### Questions answered under the schedule", ""]
    lines += questions(asked)
    lines += _accuracy_over_kl(asked)
    lines += ["", "### Answers of the served model, greedy", ""]
    lines += answers(record.newest("answers"))
    lines += ["", "### ρ and k (the paper's Table III)", ""]
    speed = ("speed-up, of ideal", _speed)
    lines += table(
        grid,
        [setting("rho", "ρ"), setting("k"), drop, *QUALITY, ("KV saved (Eq. 15)", _saved), speed],
    )
    lines += ["", "![perplexity over ρ](quality_rho.png)", ""]
    lines += ["![KV saved over ρ, at the pool and by Eq. 15](quality_kv.png)"]
    lines += ["", "### Where the adapter sits (Table V): ρ = 0.5, k = 2", ""]
    lines += table(injection, [setting("injection"), *QUALITY])
    lines += ["", "### Text and rank: ρ = 0.25, k = 3", ""]
    lines += table(rank, [setting("tokens"), setting("rank"), *QUALITY])
    lines += ["", "![perplexity over text and rank](quality_rank.png)"]
    written = sorted(fitted(rho=0.25, k=3, tokens=32768, kv=None), key=by("kv"))
    lines += ["", "### KV skipped or written: ρ = 0.25, k = 3, 32,768 tokens", ""]
    lines += table(written, [setting("kv"), *QUALITY])
    lines += ["", "### Choice of layers: ρ = 0.25, k = 3", ""]
    lines += table(choice, [setting("layers", "chosen by"), drop, *QUALITY])
    lines += _what_drops()
    draw(grid, "rho", "k", DOCS / "quality_rho.png")
    draw(rank, "tokens", "rank", DOCS / "quality_rank.png")
    pools = [r for r in record.newest("kv_saving") if "injection" not in r["settings"]]
    of_the_model = [r for r in pools if r["settings"]["model"] == "135m"]
    draw_saving(of_the_model, DOCS / "quality_kv.png")
    return lines


def _what_drops() -> list[str]:
    """Whole layers, attentions and mixes at k = 3, as table and figure; nothing without records."""
    kinds = {
        "layers": fitted(k=3),
        "layers, by KL": chosen(k=3),
        "attention": fitted(k=3, injection="attn"),
        "attention, by KL": chosen(k=3, injection="attn"),
        "mix, by KL": mixed(k=3),
    }
    if not kinds["attention"]:
        return []
    points = {
        kind: [(_equation_15(r), r["metrics"]["all"]["kl"]) for r in records]
        for kind, records in kinds.items()
    }
    draw_kl_over_kv(points, DOCS / "quality_kv_kl.png")
    attention = (
        "attention of",
        lambda r: _numbers(r["metrics"].get("drop_attention", ())),
    )
    columns = [("drop layers", _drop_layers), attention, *QUALITY]
    columns.append(("KV saved, Eq. 15", lambda r: f"{_equation_15(r):.1%}"))
    lines = ["", "### What drops: layers, their attention, or a mix: k = 3", ""]
    for kind, records in kinds.items():
        shown = table(
            sorted(records, key=_equation_15), [("what drops", lambda r, k=kind: k), *columns]
        )
        lines += shown if kind == "layers" else shown[2:]
    return [*lines, "", "![KL over KV saved, by what drops](quality_kv_kl.png)"]


def rendered_page() -> str:
    """The page with its tables as the records have them."""
    before, rest = PAGE.read_text().split(BEGIN)
    return "\n".join([before + BEGIN, *sections(), END + rest.split(END)[1]])


if __name__ == "__main__":
    PAGE.write_text(rendered_page())
