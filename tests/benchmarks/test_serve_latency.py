"""The serving benchmark is honest: a fake server with known delays, counts that do not fit."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import serve_latency
from record import repeats
from support import plots, record, serve_figures, stream_client, tables, variants
from support.stream_client import Answer

K, LAYERS, LAYER_MS, REST_MS = 3, 8, 5.0, 10.0
BLOCKS, BLOCK_BYTES = 100, 1000


class Clock:
    """The client's clock: it stands still until the server says how much later it is.

    The server waits until its chunk was stamped, so a client that holds chunks back is found out,
    and what is reported does not depend on how busy the machine is.
    """

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0
        self.changed = threading.Condition()

    def __call__(self) -> float:
        with self.changed:
            self.reads += 1
            self.changed.notify_all()
            return self.now

    def stamped(self, write: Callable[[], None]) -> None:
        """Write a chunk, two lines, and wait until both have been stamped."""
        with self.changed:
            before = self.reads
            write()
            assert self.changed.wait_for(lambda: self.reads == before + 2, timeout=20)


CLOCK = Clock()


class Fake:
    """An OpenAI server whose n layers take 5 ms each, and the rest 10.

    Args:
        drop: layers that a LoRA step leaves out; None for a stock server
        counts: whether `/metrics` shows the LoRA steps
    """

    def __init__(self, layers: int, drop: int | None = None, counts: bool = True) -> None:
        self.full_ms = layers * LAYER_MS + REST_MS
        self.lora_ms = self.full_ms - (drop or 0) * LAYER_MS
        self.drop, self.counts = drop, counts
        self.steps = {"full": 0, "lora": 0}
        self.held = 0
        self.polled = threading.Event()
        handler = type("Handler", (Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def complete(self, asked: dict[str, Any]) -> Iterator[bytes]:
        k = asked.get("vllm_xargs", {}).get("lora_drop_k", 0)
        for n in range(asked["max_tokens"]):
            lora = n % (k + 1) > 0
            CLOCK.now += (self.lora_ms if lora else self.full_ms) / 1000
            self.steps["lora" if lora and self.counts else "full"] += 1
            yield json.dumps({"choices": [{"text": "", "token_ids": [n]}]}).encode()
        if asked["cache_salt"] == "kv":  # the most is held at the end
            self.held = 10 if self.drop is None else 8
            for _ in range(2):  # the poll under way may have looked before
                self.polled.clear()
                assert self.polled.wait(20)
            self.held = 0

    def metrics(self) -> str:
        lines = {
            "vllm:num_requests_running": 0,
            "vllm:kv_cache_usage_perc": self.held / BLOCKS,
            f'vllm:cache_config_info{{num_gpu_blocks="{BLOCKS + 1}",'
            f'kv_cache_memory_bytes="{(BLOCKS + 1) * BLOCK_BYTES}"}}': 1,
        }
        if self.drop is not None:
            lines |= {f"vllm:lora_drop_{k}_steps_total": n for k, n in self.steps.items()}
        return "".join(f"{name} {value}\n" for name, value in lines.items())


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def do_GET(self) -> None:
        models = json.dumps({"data": [{"id": "fake"}]})
        self._begin()
        self.wfile.write((self.fake.metrics() if "metrics" in self.path else models).encode())
        self.fake.polled.set()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._begin()
        for chunk in self.fake.complete(asked):
            CLOCK.stamped(lambda data=chunk: self.wfile.write(b"data: " + data + b"\n\n"))
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def model(tmp_path: Path) -> Path:
    """A folder with a config, which is all that is read of a model here."""
    shape = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | {"vocab_size": 100}))
    return folder


def run(tmp_path: Path, ours: Fake, *flags: str) -> tuple[int, Any]:
    """The benchmark against fake servers: its exit code and its record."""
    urls = ["--url", ours.url, "--stock-url", Fake(LAYERS).url]
    urls += ["--fewer-layers-url", Fake(LAYERS // 2).url]
    sizes = ["--concurrency", "1", "--context", "8", "--tokens", "6", "--rounds", "2"]
    code = serve_latency.main(["--model", str(model(tmp_path)), *urls, *sizes, *flags])
    (line,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    return code, json.loads(line)


@pytest.fixture(autouse=True)
def records_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: {"cpu": "fake", "cores": 2})
    monkeypatch.setattr(stream_client, "perf_counter", CLOCK)
    monkeypatch.setattr(variants, "SPIN_SECONDS", 0)


def test_known_delays_are_reported(tmp_path: Path) -> None:
    """2 of 8 layers drop: 50 ms a full step, 40 a LoRA step."""
    code, written = run(tmp_path, Fake(LAYERS, drop=2), "--kv-tokens", "0")
    assert code == 0 and "failed" not in written
    m = written["metrics"]
    known = {"stock": 50, "fewer_layers": 30, "k0": 50, "lora_drop": 40}
    assert m["p50_ms"] == pytest.approx(known, rel=0.02)
    assert m["mean_ms"] == pytest.approx(known | {"lora_drop": (4 * 40 + 50) / 5}, rel=0.02)
    assert m["p99_ms"] == pytest.approx(known | {"lora_drop": 50}, rel=0.02)
    assert (m["lora_step_ms"], m["full_step_ms"]) == pytest.approx((40, 50), rel=0.02)
    assert m["ttft_ms"]["stock"]["p50"] == pytest.approx(50, rel=0.02)
    assert m["tokens_per_s"]["lora_drop"] == pytest.approx(6 / 0.26, rel=0.02)
    assert m["speed_up"] == pytest.approx(4 * 50 / (3 * 40 + 50), rel=0.02)
    assert m["share_of_ideal"] == pytest.approx(1, rel=0.02)
    assert m["layer_ms"] == pytest.approx(5, rel=0.02)
    assert m["steps"] == {"full": 4, "lora": 8}
    assert tables.of([written]).count("\n") == 2
    assert "measured twice" in repeats()
    slower = written | {"metrics": m | {"speed_up": m["speed_up"] / 1.1}}
    with (tmp_path / "cpu.jsonl").open("a") as out:
        out.write(json.dumps(slower) + "\n")
    assert repeats().endswith("10.0% apart")
    assert "1.07x ± 0.00 (1.07–1.18 in 2 runs)" in tables.of(record.newest())


def test_kv_is_read_while_a_request_runs(tmp_path: Path) -> None:
    _, written = run(tmp_path, Fake(LAYERS, drop=2), "--kv-tokens", "24")
    m = written["metrics"]
    assert m["kv_held"]["stock"] == {"blocks": 10, "bytes": 10_000}
    assert m["kv_saved"] == 0.2
    assert m["kv_equation_15"] == 2 / 8 * 3 / 4
    assert m["kv_saved_ideal"] == pytest.approx(2 / 8 * 3 / 4 * 24 / 32, abs=1e-4)
    other = written | {"settings": written["settings"] | {"rho": 0.75}}
    drawn = [path.name.split("_model_")[0] for path in plots.draw([written, other], tmp_path)]
    assert drawn == ["steps", "steps", "speed_up", "kv_saving"]


@pytest.mark.parametrize(
    ("drop", "counts", "why"),
    [(2, False, "0 LoRA steps instead of 4"), (None, True, "no vllm:lora_drop_full_steps")],
    ids=["nothing dropped", "stock vLLM"],
)
def test_a_run_without_the_drop_path_is_recorded_as_failed(
    tmp_path: Path, drop: int | None, counts: bool, why: str
) -> None:
    code, written = run(tmp_path, Fake(LAYERS, drop, counts))
    assert code == 1
    assert why in written["failed"] and "metrics" not in written
    assert record.newest() == []  # and so in no table


def test_one_server_is_awake_at_a_time() -> None:
    sleepers = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]

    def states() -> list[str]:
        """T: stopped, S: asleep as usual."""
        alive = [s for s in sleepers if s.poll() is None]
        return [Path(f"/proc/{s.pid}/stat").read_text().split()[2] for s in alive]

    first, second = (variants.Variant("", "", group=s.pid) for s in sleepers)
    try:
        with variants.standing_still([first, second, second, variants.Variant("", "")]):
            assert eventually(states, ["T", "T"])
            with variants.awake(second):
                assert eventually(states, ["T", "S"])
            assert eventually(states, ["T", "T"])
            sleepers[0].kill()
            sleepers[0].wait()
        assert eventually(states, ["S"])
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def eventually(found: Callable[[], Any], wanted: Any) -> bool:
    """True if it is found within seconds; a signal takes some time to arrive."""
    deadline = time.monotonic() + 10
    while found() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(found() == wanted)


def test_only_steps_that_all_requests_share_count() -> None:
    """The second prompt came two steps late; from then on its gaps tell the kinds."""
    first = Answer(0.0, (1.0, 1.1, 1.9, 2.0, 2.1, 2.2), (0,) * 6, 6)
    second = Answer(0.0, (1.9, 2.0, 2.1, 2.2, 2.4, 2.6), (0,) * 6, 6)
    shared = serve_figures.together([first, second])
    assert shared == pytest.approx([100, 100, 100])


def test_baseline_and_quality_cannot_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, why in (
        (["--url", "http://x"], "--stock-url"),
        (["--peers", "--model", "1b"], "real weights"),
    ):
        with pytest.raises(SystemExit):
            serve_latency.parse(flags)
        assert why in capsys.readouterr().err


def test_what_cannot_be_served_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no adapter_config"):
        serve_latency.main(["--model", str(model(tmp_path)), "--adapter", "nowhere"])
