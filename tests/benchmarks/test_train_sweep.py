"""The sweep of training settings, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_sweep
from chat_models import make_chat_model
from support import record, tables


def test_each_run_changes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same seed, same adapter; a higher learning rate, another. The record names no folder."""
    model = make_chat_model(tmp_path / "model", "llama", "smollm2")
    asked, reply = (
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": 9 * "so is "},
    )
    text = tmp_path / "chat.jsonl"
    text.write_text(9 * (json.dumps({"messages": [asked, reply]}) + "\n"))
    flags = f"--corpus {text} --rank 2 --length 128 --batch 1 --tokens 256 --warmup 1"
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    command = ["train_sweep.py", str(model), "--chat", str(text), "--steps", "6"]
    command += ["--flags", flags, "--vary", "--seed 0", "--lr 0.05"]
    monkeypatch.setattr("sys.argv", command)
    train_sweep.main()
    (file,) = (tmp_path / "results").glob("*.jsonl")
    assert str(tmp_path) not in file.read_text()
    found = json.loads(file.read_text())
    assert found["settings"]["flags"].startswith("--corpus chat.jsonl ")
    plain, same, faster = found["metrics"]["runs"]
    assert same["steps"] == plain["steps"] != faster["steps"]
    assert plain["tokens"] > 0 and plain["tokens_per_s"] > 0
    rows = tables.train_sweep(found)
    assert [row[0] for row in rows] == ["–", "`--seed 0`", "`--lr 0.05`"]
    assert [row[4] for row in rows[:2]] == ["", "1.00"]
