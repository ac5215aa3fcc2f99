"""The benchmarks' own arithmetic and bookkeeping; no engine is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import decode_latency
import gpu_session


def test_known_step_times_give_the_known_ratios() -> None:
    """32 layers of 1 ms and 4 ms of rest; 14 drop layers at no cost; one slow step in a hundred."""
    rounds: Any = {
        "stock": [[36.0] * 99 + [500.0]] * 3,
        "k0": [[36.36] * 100] * 3,
        "fewer_layers": [[20.0] * 100] * 3,
        "lora_drop": [[22.0, 22.0, 22.0, 36.0] * 25] * 3,
    }
    found = decode_latency.metrics_of(rounds, 32, list(range(9, 23)), 3)
    assert found["layer_ms"] == 1.0 and found["rest_ms"] == 4.0
    assert found["speed_up"] == found["ideal_speed_up"] == round(4 * 36 / (3 * 22 + 36), 3)
    assert found["share_of_ideal"] == found["lora_step_over_ideal"] == 1.0
    assert found["k0_over_stock"] == 1.01
    assert (found["lora_step_ms"], found["full_step_ms"]) == (22.0, 36.0)
    assert found["p95_ms"]["lora_drop"] == 36.0  # a full step's, as Eq. 11 has it for k < 19


class Engines(dict[str, Any]):
    """Variants that answer with constant times; the drop path runs `share` of its LoRA steps."""

    def __init__(self, share: float) -> None:
        class Fake:
            def decode(self, batch: int, prompt: int, tokens: int, k: int | None) -> Any:
                wanted = (tokens - 1) - (tokens - 1) // ((k or 0) + 1)
                return {
                    "times": [1.0] * (tokens - 1),
                    "lora_steps": int(share * wanted),
                    "gpu_bytes": 0,
                }

        super().__init__({name: Fake() for name in ("stock", "lora_drop")})


def test_a_run_without_lora_steps_gives_no_figure() -> None:
    given = decode_latency.parse(["--tokens", "41", "--rounds", "1"])
    rounds, _ = decode_latency.measure(Engines(1.0), given, 1, 3)
    assert set(rounds) == {"stock", "lora_drop"}
    with pytest.raises(RuntimeError, match="0 LoRA steps instead of 30"):
        decode_latency.measure(Engines(0.0), given, 1, 3)


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
        if "benchmarks/decode_latency.py" in stage.command:
            at = stage.command.index("benchmarks/decode_latency.py")
            decode_latency.parse(list(stage.command[at + 1 :]))
        for part in stage.command:
            if part.endswith(".py"):
                assert (gpu_session.ROOT / part).exists()
