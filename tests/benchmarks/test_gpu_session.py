"""The GPU session without a GPU: its stages, their memory, and that nothing outlives one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import decode_latency
import gpu_session
import psutil
import pytest
import serve_latency
from support import gpu_memory, servers
from support.engines import SHAPES, make_shape

from lora_drop_vllm.method.cost import packed_block_sizes
from lora_drop_vllm.method.layers import num_drop_layers


def test_a_gpu_session_goes_on_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mended = tmp_path / "out", tmp_path / "mended"
    check = f"import pathlib, sys; sys.exit(not pathlib.Path({str(mended)!r}).exists())"
    stages = [
        gpu_session.Stage("good", (sys.executable, "-c", "print('fine')")),
        gpu_session.Stage("bad", (sys.executable, "-c", check)),
    ]
    monkeypatch.setattr(gpu_session, "stages", lambda: stages)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(out)])
    for code in (1, 0):
        with pytest.raises(SystemExit) as ended:
            gpu_session.main()
        assert ended.value.code == code
        mended.touch()
    lines = [json.loads(line) for line in (out / "session.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["status"]) for line in lines] == [
        ("good", "passed"),
        ("bad", "failed with 1"),
        ("bad", "passed"),
    ]
    assert (out / "good.txt").read_text() == "fine\n"
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(tmp_path), "--minutes", "0.1"])
    with pytest.raises(SystemExit):
        gpu_session.main()
    assert not (tmp_path / "session.jsonl").exists()  # nothing is begun without time for it


def test_every_stage_of_a_gpu_session_is_a_command_that_parses() -> None:
    for stage in gpu_session.stages():
        for script in (decode_latency, serve_latency):
            if (path := f"benchmarks/{script.__name__}.py") in stage.command:
                script.parse(list(stage.command[stage.command.index(path) + 1 :]))
        for part in stage.command:
            if part.endswith(".py"):
                assert (gpu_session.ROOT / part).exists()


# a server of its own session that stands still, as between two blocks of a measurement
SERVER = """
import os, signal, subprocess, sys, time
serve = "trap 'echo ended >&2; exit' TERM; echo $$; while :; do sleep 0.1; done"
server = subprocess.Popen(["sh", "-c", serve], stdout=subprocess.PIPE, start_new_session=True)
sys.stdout.buffer.write(server.stdout.readline())
sys.stdout.flush()
os.kill(server.pid, signal.SIGSTOP)
"""


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("time.sleep(600)", "out of time"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed with -9"),
    ],
    ids=["out of time", "killed"],
)
def test_nothing_of_a_stage_outlives_it(tmp_path: Path, then: str, status: str) -> None:
    """Not even a stopped server, which is let go on so that it can end by itself."""
    stage = gpu_session.Stage("leaves", (sys.executable, "-c", SERVER + then))
    assert gpu_session.run(stage, tmp_path, 3)["status"] == status
    said = (tmp_path / "leaves.txt").read_text().split()
    assert said[-1] == "ended"
    assert not psutil.pid_exists(int(said[0]))


# the session with one such stage, on a machine without a GPU
SESSION = f"""
import sys, gpu_session
stage = gpu_session.Stage("leaves", (sys.executable, "-c", {SERVER + "time.sleep(600)"!r}))
gpu_session.stages = lambda: [stage]
gpu_session.gpu_memory.card_bytes = lambda: None
gpu_session.main()
"""


def test_nothing_outlives_a_session_that_is_terminated(tmp_path: Path) -> None:
    session = subprocess.Popen(
        [sys.executable, "-c", SESSION, "--out", str(tmp_path)],
        cwd=gpu_session.ROOT / "benchmarks",
    )
    log, deadline = tmp_path / "leaves.txt", time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    server = int(log.read_text())
    session.terminate()
    assert session.wait(60) == 143
    assert not psutil.pid_exists(server)


def test_a_stage_that_cannot_fit_is_refused_with_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (sys.executable, "-c", "print('ran')")
    stages = [
        gpu_session.Stage("large", command, (70_000_000_000, 30_000_000_000)),
        gpu_session.Stage("turns", command, (70_000_000_000, 30_000_000_000), take_turns=True),
    ]
    monkeypatch.setattr(gpu_session, "stages", lambda: stages)
    monkeypatch.setattr(gpu_memory, "card_bytes", lambda: 80_000_000_000)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_session.main()
    assert ended.value.code == 0
    assert "large: refused: needs 100 of 76 GB" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"turns.txt", "session.jsonl"}


class FakeEngine:
    """An engine that knows how many live beside it, and answers with constant times."""

    alive: list[str] = []
    most = 0
    asked: set[int | None] = set()  # k, of the LoRA-Drop engine

    def __init__(
        self, model: str, settings: Any, arguments: dict[str, Any], filled: bool = False
    ) -> None:
        self.ours = settings is not None
        self.alive.append(model)
        FakeEngine.most = max(self.most, len(self.alive))

    def wait(self) -> None:
        pass

    def decode(self, batch: int, prompt: int, tokens: int, k: int | None) -> dict[str, Any]:
        if self.ours:
            self.asked.add(k)
        steps = (tokens - 1) - (tokens - 1) // ((k or 0) + 1)
        return {"times": [1.0] * (tokens - 1), "lora_steps": steps, "gpu_bytes": 0}

    def close(self) -> None:
        self.alive.pop()


@pytest.mark.parametrize(("card", "most"), [(80, 3), (50, 1), (20, 0)], ids=lambda n: str(n))
def test_engines_that_do_not_fit_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: int, most: int
) -> None:
    """Three engines of 55 GB, the largest of 21; k = 0 is asked of the LoRA-Drop engine."""
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(FakeEngine, "most", 0)
    monkeypatch.setattr(FakeEngine, "asked", set())
    monkeypatch.setattr(decode_latency, "Engine", FakeEngine)
    monkeypatch.setattr(decode_latency.record, "write", lambda *args: records.append(args[2]))
    monkeypatch.setattr(gpu_memory, "card_bytes", lambda: card * 10**9)
    given = decode_latency.parse(["--model", "llama-3-8b", "--tokens", "41", "--rounds", "1"])
    if most == 0:
        with pytest.raises(ValueError, match=r"--model llama-3-8b --batch 1: refused: needs 21 of"):
            decode_latency.run(given, tmp_path)
        assert FakeEngine.most == 0
        return
    decode_latency.run(given, tmp_path)
    assert FakeEngine.most == most and not FakeEngine.alive
    assert FakeEngine.asked == {0, 3}
    (found,) = records  # once all variants have run
    assert set(found["ms_per_token"]) == {"stock", "fewer_layers", "lora_drop", "k0"}


def test_servers_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are up at once, so that their turns are short."""
    monkeypatch.setattr(gpu_memory, "card_bytes", lambda: 80_000_000_000)
    monkeypatch.setattr(serve_latency, "started", lambda *args: pytest.fail("one was started"))
    (stage,) = [s for s in gpu_session.stages() if s.name == "serve_llama-2-7b"]
    with pytest.raises(SystemExit, match=r"three servers at once are refused: needs 88 of 76 GB"):
        serve_latency.main([*stage.command[2:]])


def test_a_dry_run_has_a_verdict_for_both_cards(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_session.dry_run()
    printed = capsys.readouterr().out
    for stage in gpu_session.stages():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{stage.name} ")]
        assert "GB" in line and "80 GB: " in line and "141 GB: " in line
        if not stage.name.startswith("serve"):
            assert "refused" not in line


def test_weights_are_counted_as_the_model_has_them(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("llama-3-8b", "qwen2.5-7b"):
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(make_shape(tmp_path / name, name))
            model = AutoModelForCausalLM.from_config(config)
        counted = sum(p.numel() for p in model.parameters())
        assert gpu_memory.weight_bytes(SHAPES[name], 1) == pytest.approx(counted, rel=1e-3)


def test_the_pool_holds_the_requests_in_whichever_blocks() -> None:
    """llama-3-8b, 14 drop layers: blocks of 64 tokens in 18 layers, or of 80 in 14."""
    pool = gpu_memory.pool_bytes(SHAPES["llama-3-8b"], 2, 8, 129, 14)
    block = 18 * 64 * gpu_memory.layer_token_bytes(SHAPES["llama-3-8b"], 2)
    assert pool == block * (8 * (3 + 1 + 2 + 1) + 1)


def test_the_page_on_gpus_says_how_large_blocks_are() -> None:
    """Bytes of a packed block over those of a stock block, for the paper's shapes and ratios."""
    ratios = {}
    for model, rho in itertools.product(gpu_session.PAPER_MODELS, gpu_session.RATIOS):
        layers = SHAPES[model]["num_hidden_layers"]
        drop = num_drop_layers(float(rho), layers)
        on_size, drop_size = packed_block_sizes(layers - drop, drop, gpu_memory.UNIT)
        block = max((layers - drop) * on_size, drop * drop_size)
        ratios[model, rho] = block / (layers * gpu_memory.UNIT)
    page = " ".join((gpu_session.ROOT / "docs/gpu.md").read_text().split())
    assert f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f} times as many" in page
    stock = 512 * gpu_memory.UNIT * 32 * gpu_memory.layer_token_bytes(SHAPES["llama-3-8b"], 2)
    ours = stock * ratios["llama-3-8b", "0.5"]
    assert f"{ours / 1e9:.1f} instead of {stock / 1e9:.2f} GB" in page


def test_every_engine_on_a_gpu_asks_for_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default vLLM wants nearly the whole card to be free."""
    monkeypatch.setattr(gpu_memory, "card_bytes", lambda: 80_000_000_000)
    given = decode_latency.parse(["--model", "llama-3-8b"])
    shares = {
        name: decode_latency.engine_arguments(given, name)["gpu_memory_utilization"]
        for name in decode_latency.ENGINES
    }
    assert shares["stock"] == shares["lora_drop"] > shares["fewer_layers"]
    assert sum(shares.values()) < 1
    for name, need in decode_latency.needs(given).items():
        assert shares[name] * 80e9 >= need

    class Subject:
        config, dummy = SHAPES["llama-3-8b"], True

    serving: Any = serve_latency.parse(["--model", "llama-3-8b"])
    flags = servers.engine_flags(Subject(), serving)  # type: ignore[arg-type]
    share = float(flags[flags.index("--gpu-memory-utilization") + 1])
    assert share * 80e9 >= servers.needs(Subject.config, serving)["stock"]
