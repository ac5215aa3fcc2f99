"""Comparison of the tests' training runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.training.checkpoint import FILE, LOG

WORDS = "Bees find their way home by the position of the sun. A bee that has found flowers dances. "
STEPS = 12


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder, read_config(folder))


def assert_equal(folder: Path, other: Path) -> None:
    """Asserts the same adapter, optimizer and log, except for the speed."""
    a, b = tensors_of(folder), tensors_of(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (folder / FILE).read_bytes() == (other / FILE).read_bytes()
    logs = []
    for out in (folder, other):
        lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
        assert all(line.pop("tokens_per_s") > 0 for line in lines)
        logs.append(lines)
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, STEPS + 1))
