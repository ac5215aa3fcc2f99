"""What the README shows of the records: four figures beside their ideal, and one picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from support import record
from support.load.tables import whole_pool
from support.quality_records import WINDOWS, adapter, chats, finished, fitted, last_of_each
from support.tables import machine_name

Record = dict[str, Any]
K = 3  # of the adapters
LOAD_SHAPE = {"prompt": 32, "tokens": 64}
TRAINED = {"rho25-skip": 0.25, "rho50-skip": 0.5}  # adapter: the rho of its number of drop layers


@dataclass(frozen=True)
class Point:
    """One marker of the picture.

    Attributes:
        group: `fitted`, `trained` or `peer`
        rho: drop ratio; None for a peer
        kl: nats per token from the base model
        interval: 95 % interval of the speed-up; None where the record has none
    """

    group: str
    label: str
    rho: float | None
    kl: float
    speed_up: float
    interval: tuple[float, float] | None = None


def headline() -> str:
    """The README's table: what was measured of two adapters, and the best it could be."""
    columns = [_headline_column(adapter, rho) for adapter, rho in TRAINED.items()]
    names = (
        f"on {machine_name(_speed(TRAINED['rho25-skip'], K))}",
        "speed-up over stock vLLM",
        "tokens/s over stock vLLM under load",
        "KV left to other requests",
        "same best token as the base model, in chat",
        "perplexity (ideal: the base model's)",
    )
    lines = [[name, *cells] for name, *cells in zip(names, *columns)]
    lines = [[line[0], *(cell for pair in line[1:] for cell in pair)] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headline_column(name: str, rho: float) -> list[tuple[str, str]]:
    """Measured and ideal, below their heading: speed, under load too, KV and quality."""
    speed, quality = _speed(rho, K)["metrics"], _trained(name)["metrics"]
    low, high = speed["speed_up_95"]
    kv = _latest("kv_saving", rho=rho, k=K)["metrics"]
    chat = _of(name, chats())["metrics"]["steps"]["all"]
    return [
        (f"`{name}`: {len(quality['drop_layers'])} of 30 layers drop", "ideal"),
        (
            f"{speed['speed_up']:.2f}x ± {(high - low) / 2:.2f}",
            f"{speed['ideal_speed_up']:.2f}x",
        ),
        (_under_load(name), ""),
        (f"{kv['saved']:.1%}", f"{kv['equation_15']:.1%}"),
        (f"{chat['agreement']:.1%}", "100%"),
        (f"{quality['all']['perplexity']:.1f}", f"{quality['all']['base_perplexity']:.1f}"),
    ]


def _under_load(adapter: str) -> str:
    """Tokens/s at the highest rate of load.py, beside stock vLLM."""
    wanted = {"adapter": adapter} | LOAD_SHAPE
    for r in whole_pool():
        if wanted.items() <= r["settings"].items():
            mean, low, high = r["metrics"]["rates"][-1]["against"]["stock"]["tokens_per_s"]
            return f"{mean:.2f}x ± {(high - low) / 2:.2f}"
    return "not measured"


def _speed(rho: float, k: int) -> Record:
    usual: dict[str, Any] = dict(batch=1, prompt=16, dtype="float32", compile=False)
    return _latest("decode_latency", rho=rho, k=k, **usual)


def _latest(benchmark: str, **wanted: Any) -> Record:
    found = record.latest(benchmark, model="135m", injection=None, **wanted)
    if found is None:
        raise RuntimeError(f"benchmarks/results has no record of {benchmark} with {wanted}")
    return found


def _trained(name: str) -> Record:
    """Its last record on the windows of the fitted adapters beside it."""
    return _of(name, last_of_each(finished(WINDOWS)))


def _of(name: str, records: Sequence[Record]) -> Record:
    return next(r for r in records if adapter(r) == name)


def points() -> list[Point]:
    """All markers of the picture, from the newest records."""
    found = []
    for r in sorted(fitted(), key=lambda r: (r["settings"]["rho"], r["settings"]["k"])):
        rho, k = r["settings"]["rho"], r["settings"]["k"]
        found.append(_point("fitted", f"k = {k}", r, _speed(rho, k)))
    for name, rho in TRAINED.items():
        found.append(_point("trained", name, _trained(name), _speed(rho, K)))
    first = next(iter(TRAINED))
    peers = record.latest("peers", adapter=first, concurrency=1)
    for peer in peers["metrics"]["peers"] if peers else ():
        if "speed_up" in peer:
            name = re.split(r",| of | \(", peer["what"])[0]
            label = f"{name}, {first}" if name == "LoRA-Drop" else name
            found.append(Point("peer", label, None, peer["kl"], peer["speed_up"]))
    return found


def _point(group: str, label: str, quality: Record, speed: Record) -> Point:
    """The KL of one record beside the speed-up of another."""
    kl, m = quality["metrics"]["all"]["kl"], speed["metrics"]
    rho = speed["settings"]["rho"]
    return Point(group, label, rho, kl, m["speed_up"], tuple(m["speed_up_95"]))


def digest(shown: list[Point]) -> str:
    """Fingerprint of the figures of a picture; the file carries it, so a stale one is noticed."""
    figures = json.dumps([asdict(point) for point in shown], sort_keys=True)
    return hashlib.sha256(figures.encode()).hexdigest()
