"""Markdown tables of records: printed when a benchmark ends, and shown in docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from support.load import tables as load_tables

Record = dict[str, Any]


def of(records: Sequence[Record]) -> str:
    """The tables of each benchmark among the records; none of these failed."""
    found = []
    for benchmark, table in TABLES.items():
        for header, rows in (table, *FURTHER.get(benchmark, ())):
            lines = [row for r in records if r["benchmark"] == benchmark for row in rows(r)]
            if lines:
                names = header.split("|")
                cells = (names, ["---"] * len(names), *lines)
                found.append("\n".join(_line(line) for line in cells))
    return "\n\n".join(found)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.strip() for cell in cells)} |"


def decode_latency(r: Record) -> list[list[str]]:
    """Step times of the engine alone."""
    s, m = r["settings"], r["metrics"]
    ratios = [_repeated(r), _times(m["ideal_speed_up"]), f"{m['share_of_ideal']:.2f}"]
    size, drops = f"{s['batch']} × {s['prompt']}", DROPS[s.get("injection", "block")]
    setting = [f"{s['model']} shape, {_how(s)}", size, drops, f"{s['rho']}, {s['k']}"]
    return [[*setting, *ratios, f"{m['k0_over_stock']:.2f}", machine_name(r)]]


def kv_saving(r: Record) -> list[list[str]]:
    """Blocks counted at the pool."""
    s, m = r["settings"], r["metrics"]
    lengths = f"{s['prompt']} + {s['tokens']}"
    setting = [f"{s['model']} shape{_attention(s)}", f"{s['rho']}, {s['k']}", lengths]
    return [[*setting, f"{m['saved']:.1%}", f"{m['equation_15']:.1%}"]]


def serve_latency(r: Record) -> list[list[str]]:
    """A served model as its clients see it; a pair in a cell is stock vLLM and LoRA-Drop."""
    s, m = r["settings"], r["metrics"]

    def pair(values: dict[str, float], digits: int = 1) -> str:
        return f"{values['stock']:.{digits}f} → {values['lora_drop']:.{digits}f}"

    first = {name: times["p50"] for name, times in m["ttft_ms"].items()}
    ideal = m.get("ideal_speed_up")
    saved = "" if "kv_saved" not in m else f"{m['kv_saved']:.1%} ({m['kv_saved_ideal']:.1%})"
    return [
        [
            _served(s),
            f"{s['concurrency']} × {s['context']} + {s['tokens']}",
            f"{s['rho']:.2g}, {s['k']}",
            *(pair(m[name]) for name in ("p50_ms", "p95_ms", "p99_ms")),
            pair(first, 0),
            pair(m["tokens_per_s"]),
            _repeated(r),
            "" if ideal is None else f"{ideal:.2f}x, {m['share_of_ideal']:.2f}",
            f"{m['k0_over_stock']:.2f}",
            saved,
            machine_name(r),
        ]
    ]


def peers(r: Record) -> list[list[str]]:
    """Other ways to serve the same model, measured in the same session."""
    s = r["settings"]
    size = f"{s['concurrency']} × {s['context']} + {s['tokens']}"
    return [
        [
            _served(s),
            size,
            peer["what"],
            *([f"{peer['ms_per_token']:.1f}", _times(peer["speed_up"])]),
            f"{peer['kl']:.3f}",
            f"{peer['agreement']:.3f}",
            machine_name(r),
        ]
        if "ms_per_token" in peer
        else [_served(s), size, peer["what"], *["–"] * 4, "not measured"]
        for peer in r["metrics"]["peers"]
    ]


def quantized(r: Record) -> list[list[str]]:
    """Quality of a model and its quantized copies under one adapter."""
    found = []
    for m in r["metrics"]["models"]:
        steps, fitted = m["quality"]["all"], "–"
        if "fitted_plain" in m:
            kls = [m[name]["all"]["kl"] for name in ("fitted_plain", "fitted_own")]
            fitted = " / ".join(f"{kl:.3f}" for kl in kls)
        quality = f"{steps['base_perplexity']:.1f} → {steps['perplexity']:.1f}"
        near, far = m["served_distance"], m["served_distance_plain"]
        row = [m["model"], r["settings"]["adapter"], quality, f"{steps['kl']:.3f}"]
        found.append([*row, f"{steps['agreement']:.1%}", fitted, f"{near:.3f} / {far:.3f}"])
    return found


def quantized_speed(r: Record) -> list[list[str]]:
    """Decode speed of the same models."""
    found = []
    for m in r["metrics"]["models"]:
        times = (f"{m['ms_per_token'][name]:.1f}" for name in ("stock", "lora_drop"))
        over = (_with_interval(m["over_plain"][name]) for name in ("stock", "lora_drop"))
        k0 = f"{m['k0_over_stock']:.2f}"
        row = [m["model"], f"{r['settings']['rho']:.2g}, {r['settings']['k']}", " → ".join(times)]
        found.append([*row, _with_interval(m), *over, k0, machine_name(r)])
    return found


def capacity(r: Record) -> list[list[str]]:
    """Requests that fit into a fixed pool."""
    s, m = r["settings"], r["metrics"]
    stock, ours = m["stock"], m["lora_drop"]
    return [
        [
            f"{s['model']} shape{_attention(s)}",
            f"{s['rho']}, {s['k']}",
            f"{s['prompt']} + {s['tokens']}",
            f"{s['pool_mb']} MB",
            f"{stock['fit']} → {ours['fit']}",
            f"{m['offered']}: {stock['tokens_per_s']:.1f} → {ours['tokens_per_s']:.1f}",
            f"{stock['preemptions']} → {ours['preemptions']}",
            machine_name(r),
        ]
    ]


def step_breakdown(r: Record) -> list[list[str]]:
    """The parts of a step's time, in milliseconds."""
    s, m = r["settings"], r["metrics"]
    columns = [m[name] for name in ("stock", "full", "lora", "gap")]
    totals = [sum(column.values()) for column in columns]
    model = f"{s['model']} shape, batch {s['batch']}"
    rows = [[model, part, *(f"{c[part]:.2f}" for c in columns)] for part in m["stock"]]
    return [*rows, [model, "sum", *(f"{total:.2f}" for total in totals)]]


def fit_time(r: Record) -> list[list[str]]:
    """Minutes from a model to an adapter."""
    s, rounds = r["settings"], r["metrics"]["rounds"]
    minutes = (
        ", ".join(f"{one[name] / 60:.1f}" for one in rounds) for name in ("first_s", "again_s")
    )
    command = f"`lora-drop fit` {' '.join(s['flags'])}"
    count = ", ".join(str(one["conversations"]) for one in rounds)
    return [[s["model"], command, count, *minutes, machine_name(r)]]


def train_sweep(r: Record) -> list[list[str]]:
    """Trained alike but for one setting: tokens, their speed, and the distance that is left."""
    runs, rows = r["metrics"]["runs"], []
    for run in runs:
        kl, plain = (one["steps"]["all"]["kl"] for one in (run, runs[0]))
        ratio = f"{kl / plain:.2f}" if run["vary"] else ""
        vary = f"`{run['vary']}`" if run["vary"] else "–"
        agreement = f"{run['steps']['all']['agreement']:.1%}"
        speed = f"{run['tokens_per_s']:.0f}"
        rows.append([vary, f"{run['tokens']:,}", speed, f"{kl:.3f}", ratio, agreement])
    return rows


def _served(settings: Record) -> str:
    weights = f", adapter {settings['adapter']}" if settings["adapter"] else ", untrained"
    return f"{settings['model']}{weights}, {_how(settings)}"


def _attention(settings: Record) -> str:
    return ", attention only" if settings.get("injection") == "attn" else ""


def _how(settings: Record) -> str:
    dtype = settings.get("dtype", "auto")
    how = ["compiled" if settings["compile"] else "eager", *([dtype] if dtype != "auto" else [])]
    return ", ".join(how + ["filled context"] * settings.get("filled", False))


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _repeated(r: Record) -> str:
    """The speed-up, half its 95 % interval, and the range over the runs of one commit."""
    found, speeds = _with_interval(r["metrics"]), r.get("speed_ups", [])
    if len(speeds) < 2:
        return found
    return f"{found} ({min(speeds):.2f}–{max(speeds):.2f} in {len(speeds)} runs)"


def _with_interval(metrics: dict[str, Any]) -> str:
    """A speed-up, and half its 95 % interval where there is one."""
    found = _times(metrics["speed_up"])
    if interval := metrics.get("speed_up_95"):
        found += f" ± {(interval[1] - interval[0]) / 2:.2f}"
    return found


def machine_name(r: Record) -> str:
    """The GPU of a record's machine, or its CPU, cores and, in newer records, instructions."""
    found = r["machine"]
    cpu = f"{found['cores']} cores of {found['cpu']}"
    cpu += f", {r['instructions']}" if "instructions" in r else ""
    return found.get("gpu") or cpu


DROPS = {"block": "layers", "attn_mlp": "layers, in halves", "attn": "attention"}
Table = tuple[str, Callable[[Record], list[list[str]]]]  # header, and the rows of a record
# second tables of the same records
FURTHER: dict[str, list[Table]] = {
    "load": [(load_tables.AGAINST, load_tables.against)],
    "quantized": [
        (
            "quantized, stock → LoRA-Drop | ρ, k | ms per token | speed-up over the same model | "
            "stock over the first model's | LoRA-Drop over the first model's stock | "
            "k = 0 against stock | machine",
            quantized_speed,
        )
    ],
}
TABLES: dict[str, Table] = {
    "decode_latency": (
        "decoding | batch × prompt | what drops | ρ, k | speed-up | ideal | share of ideal | "
        "k = 0 against stock | machine",
        decode_latency,
    ),
    "kv_saving": (
        "KV blocks at the pool | ρ, k | prompt + generated | saved | Eq. 15",
        kv_saving,
    ),
    "serve_latency": (
        "served, stock → LoRA-Drop | requests × prompt + generated | ρ, k | p50 ms | p95 ms | "
        "p99 ms | first token ms | tokens/s | speed-up | ideal, share of it | k = 0 against stock "
        "| KV saved (Eq. 15) | machine",
        serve_latency,
    ),
    "peers": (
        "peers | requests × prompt + generated | | ms per token | speed-up | KL to base | "
        "same best token | machine",
        peers,
    ),
    "quantized": (
        "quantized, base → LoRA-Drop | adapter | perplexity | KL to its own base | "
        "same best token | KL if fitted on the first model / on itself | "
        "served against offline, nats: own weights / the first model's",
        quantized,
    ),
    "capacity": (
        "capacity, stock → LoRA-Drop | ρ, k | prompt + generated | KV pool | "
        "requests before the first preemption | offered: tokens/s | preemptions | machine",
        capacity,
    ),
    "fit_time": (
        "model | command | conversations | minutes | minutes again, text kept | machine",
        fit_time,
    ),
    "train_sweep": (
        "changed | tokens | tokens/s | KL to base | over the first row's | same best token",
        train_sweep,
    ),
    "step_breakdown": (
        "a step's milliseconds | part | stock vLLM | full step | LoRA step | beyond the ideal",
        step_breakdown,
    ),
    "load": (load_tables.LOAD, load_tables.load),
    "simulate": (load_tables.SIMULATE, load_tables.simulate),
    "calibration": (load_tables.CALIBRATION, load_tables.calibration),
}
