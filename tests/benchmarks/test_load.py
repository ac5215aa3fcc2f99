"""The benchmark under load does its sums right; a fake client stands in for vLLM's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import load
import pytest
from support import record, tables
from support.load import client, picture
from support.load.client import Offer, Run, Shape
from support.load.figures import VARIANTS, check, figures, interval, rate_figures, saturation
from support.load.tables import verdict
from support.servers import Subject
from support.stream_client import Metrics, RunFailedError
from support.variants import Variant

LORA = {"steps": 40, "preemptions": 2, "full": 10, "lora": 30, "prompt": 4}
STOCK = {"steps": 40, "preemptions": 0}


def run(tpot: float = 50.0, counts: dict[str, int] = LORA, tokens_per_s: float = 20.0) -> Run:
    """Four requests: first tokens after 100 to 400 ms, the others `tpot` ms apart."""
    gaps = [[999.0, tpot, tpot, tpot]] * 4
    firsts = [100.0, 200.0, 300.0, 400.0]
    return Run(firsts, [tpot] * 4, gaps, 10.0, tokens_per_s, counts, [0.1, 0.3])


@pytest.mark.parametrize(
    ("most", "asked", "found"),
    [(64, [1, 4, 16, 64], 8.0), (1000, [1, 4, 16, 64], 8.0), (10, [1, 4, 10], 5.0)],
    ids=["levels off", "is not asked further", "stops at most"],
)
def test_saturation_is_where_larger_bursts_bring_no_more(
    most: int, asked: list[int], found: float
) -> None:
    """A server that answers 16 requests at a time, in 2 seconds."""
    sizes = []

    def seconds(size: int) -> float:
        sizes.append(size)
        return 2.0 * -(-size // 16)

    assert saturation(seconds, most) == found
    assert sizes == asked


def test_figures_of_a_run() -> None:
    found = figures(run())
    assert (found["lora_share"], found["prompt_share"]) == (0.75, 0.1)
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (250, 397)
    assert found["tpot_mean_ms"] == found["tpot_p95_ms"] == 50
    assert (found["kv_used"], found["kv_used_most"], found["preemptions"]) == (0.2, 0.3, 2)
    assert "lora_share" not in figures(run(counts=STOCK))


def test_a_run_without_the_drop_path_gives_no_figure() -> None:
    idle = LORA | {"lora": 0}
    check({"stock": [run(counts=STOCK)], "now": [run()], "wait": [run(), run()]}, k=3)
    with pytest.raises(RunFailedError, match="wait: 0 LoRA steps at k = 3"):
        check({"wait": [run(), run(counts=idle)]}, k=3)
    with pytest.raises(RunFailedError, match="stock: its /metrics"):
        check({"stock": [run()]}, k=3)
    with pytest.raises(RunFailedError, match="now: its /metrics"):
        check({"now": [run(counts=STOCK)]}, k=3)


def test_differences_are_taken_within_rounds_and_have_intervals() -> None:
    """`wait` is 20 % and 30 % faster than stock in two rounds, as fast as `now` in both."""
    rounds = {
        "stock": [run(50, STOCK), run(100, STOCK)],
        "now": [run(40), run(70)],
        "wait": [run(40), run(70)],
    }
    found = rate_figures(rounds)
    assert found["wait"]["tpot_mean_ms"] == [40, 70]
    mean, low, high = found["against"]["stock"]["tpot_mean_ms"]
    half = 12.71 * 0.1 / 2  # t of one degree of freedom; sd 0.1 / sqrt(2), over sqrt(2)
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert found["against"]["now"]["tpot_mean_ms"] == [1, 1, 1]
    assert interval([3.0]) == [3, 3, 3]


@pytest.mark.parametrize(
    ("tokens", "tpot", "ttft", "found"),
    [
        (1.2, 0.8, 100, "wins"),
        (1.0, 0.8, 200, "wins, first tokens late"),
        (1.04, 0.95, 0, "no gain"),
        (1.06, 0.95, 0, "wins"),
        (1.04, 0.89, 0, "wins"),
        (1.04, 0.95, 200, "first tokens late"),
        (0.9, 0.8, 0, "mixed"),
        (0.9, 1.0, 0, "loses"),
    ],
    ids=str,
)
def test_the_verdict_weighs_speed_and_first_tokens(
    tokens: float, tpot: float, ttft: float, found: str
) -> None:
    """k = 3 full steps of 50 ms are 150 ms."""
    against = {"tokens_per_s": [tokens], "tpot_mean_ms": [tpot], "ttft_p99_ms": [ttft]}
    rate = {"against": {"stock": against}, "stock": {"tpot_mean_ms": [40.0, 60.0]}}
    assert verdict(rate, k=3) == found


class Client:
    """A client that notes what it is asked for; LoRA-Drop's requests are faster."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Offer]] = []

    def __call__(self, folder: Path, variant: Variant, shape: Shape, offer: Offer) -> Run:
        self.asked.append((variant.name, offer))
        tpot = 50.0 if variant.name == "stock" else 40.0
        found = run(tpot, STOCK if variant.name == "stock" else LORA)
        firsts = [100.0] * offer.requests
        return replace(found, ttft_ms=firsts, seconds=2.0 * -(-offer.requests // 16))


def test_variants_take_turns_at_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Client()
    monkeypatch.setattr(load, "bench", fake)
    monkeypatch.setattr(load, "pool_bytes", lambda *_: 1 << 20)
    given = load.parse(["--shapes", "32+5", "--rates", "0", "2", "--rounds", "2"])
    up = {name: Variant("", name) for name in VARIANTS}
    subject = Subject("m", tmp_path, False, None)
    monkeypatch.setattr("support.variants.SPIN_SECONDS", 0)
    found = load.measure(subject, given, load.Turns(subject, up, given.shapes[0]), k=3)
    assert found["saturation"] == 8
    assert [b["requests"] for b in found["bursts"]["stock"]] == [1, 4, 16, 64]
    assert found["bursts"]["now"][0]["gap_p50_ms"] == 40  # the gap of 999 ms came before
    assert {name for name, _ in fake.asked[:3]} == set(VARIANTS)  # to warm up
    runs = fake.asked[3 + 8 :]
    assert len(runs) == 2 * 2 * 3
    for n in range(0, len(runs), 3):
        assert {name for name, _ in runs[n : n + 3]} == set(VARIANTS)
        assert len({offer for _, offer in runs[n : n + 3]}) == 1
    offers = [offer for _, offer in runs[::3]]
    assert offers[0].at_once == 1 and offers[0].rate is None
    assert (offers[1].rate, offers[1].requests) == (16, 320)
    assert len({offer.seed for offer in offers}) == 4
    settings = {"model": "m", "adapter": "a", "prompt": 32, "tokens": 5, "k": 3, "pool_requests": 2}
    written = {"benchmark": "load", "settings": settings | {"max_requests": 4}, "metrics": found}
    first, second = tables.of([written]).split("\n\n")
    for table, rows in ((first, 4), (second, 6)):
        lines = table.splitlines()
        assert len(lines) == rows and len({line.count("|") for line in lines}) == 1
    assert "one at a time" in first and "16 (200%)" in first and "KV pool of 2" in first
    assert "-20% (-20% to -20%)" in second and "+150 ms" in second
    picture.draw([written], tmp_path / "load.png")
    assert picture.digest([written]).encode() in (tmp_path / "load.png").read_bytes()


def test_the_picture_shows_the_newest_run_of_each_rate_of_a_whole_pool(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(tokens: int, pool: int, *rates: float, **about: Any) -> dict[str, Any]:
        settings = {"model": "m", "prompt": 8, "tokens": tokens, "rounds": len(rates)}
        settings |= {"adapter": about.pop("adapter", "a")}
        settings |= {"pool_requests": pool, "max_requests": 4}
        found = [{"share_of_saturation": rate} | about for rate in rates]
        written = {"benchmark": "load", "settings": settings, "machine": {}}
        written |= {"metrics": {"rates": found}}
        with (tmp_path / "cpu.jsonl").open("a") as file:
            file.write(json.dumps(written) + "\n")
        return written

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    write(8, 4, 0, 1, 2, run="first")
    write(8, 2, 1, run="tight")
    other = write(9, 4, 1, run="other shape")
    write(8, 4, 2, run="second")
    write(8, 4, 2, run="fewer rates", adapter="b")
    first, second = picture.shown()
    assert [(x["share_of_saturation"], x["run"]) for x in first["metrics"]["rates"]] == [
        (0, "first"),
        (1, "first"),
        (2, "second"),
    ]
    assert second == other


@pytest.mark.parametrize("short", [False, True], ids=["whole", "ended early"])
def test_the_client_reads_vllms_result_and_the_counters(
    short: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = {
        "failed": 0,
        "output_lens": [5, 4 if short else 5],
        "errors": ["", ""],
        "ttfts": [0.1, 0.2],
        "latencies": [0.5, 1.0],
        "itls": [[0.1] * 4, [0.2] * 4],
        "duration": 2.0,
        "output_throughput": 5.0,
    }
    seen: list[list[str]] = []
    names = {f"vllm:{metric}": 3.0 for metric in client.COUNTS.values()}
    metrics = iter([Metrics(names, {}), Metrics({n: v + 7 for n, v in names.items()}, {})])
    monkeypatch.setattr(client, "_serve", lambda arguments: seen.append(arguments) or raw)
    monkeypatch.setattr(client, "burst", lambda *_: [])
    monkeypatch.setattr(client, "settled_metrics", lambda url: next(metrics))
    offer = Offer(2, rate=1.5, seed=4)
    if short:
        with pytest.raises(RunFailedError, match="ended before 5 tokens"):
            client.bench(tmp_path, Variant("url", "name"), Shape(8, 5), offer)
        return
    found = client.bench(tmp_path, Variant("url", "name"), Shape(8, 5), offer)
    assert found.ttft_ms == [100, 200] and found.tpot_ms == pytest.approx([100, 200])
    assert found.counts == dict.fromkeys(client.COUNTS, 7)
    flags = " ".join(seen[0])
    assert "--request-rate 1.5" in flags and "--seed 4" in flags
    assert "--max-concurrency" not in flags


@pytest.mark.parametrize("flags", ["--shapes 32", "--shapes 8+1", "--rates -1", "--rounds 0"])
def test_flags_that_cannot_be_measured_are_refused(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load.parse(flags.split())
    assert "expected" in capsys.readouterr().err
