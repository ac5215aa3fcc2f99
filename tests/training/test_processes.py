"""Training processes: killed at any moment, and several at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import WORDS, assert_equal, tensors_of

from lora_drop_vllm.cli import main
from lora_drop_vllm.training.checkpoint import LOG
from lora_drop_vllm.training.gradient import Devices


@pytest.fixture
def given(smooth_model: Path, tmp_path: Path) -> list[str]:
    """Model, corpus and the settings of a short run."""
    (tmp_path / "corpus.txt").write_text(WORDS * 60)
    return ["train", str(smooth_model), "--corpus", str(tmp_path / "corpus.txt"), "--length", "32",
            "--rank", "4", "--rho", "0.5", "--steps", "12", "--batch", "1", "--warmup", "2",
            "--save-every", "2", "--from", "zero"]  # fmt: skip


# One uninterrupted run, then runs that are killed and resumed. All processes are forks of one that
# has imported everything and done nothing else.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from transformers import AutoTokenizer, LlamaForCausalLM
from lora_drop_vllm.cli import main
from lora_drop_vllm.training import trainer
from lora_drop_vllm.training.checkpoint import LOG

kills, folder, given = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
moments = random.Random(kills)

def start(out):
    child = os.fork()
    if not child:
        os._exit(main([*given, "--out", str(out)]))
    while not (out / LOG).exists():  # written when training begins
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            sys.exit("the trainer ended before it began")
        time.sleep(0.001)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

child, began = start(folder / "whole"), time.monotonic()
assert end(child) == 0
length = time.monotonic() - began
while kills:
    out = folder / str(kills)
    child = start(out)
    time.sleep(moments.random() * length)
    os.kill(child, signal.SIGKILL)
    if end(child) != -signal.SIGKILL:  # it had finished
        shutil.rmtree(out)
        continue
    print((out / LOG).read_text().count("\\n"))
    child = start(out)
    assert end(child) == 0
    kills -= 1
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.matrix)])
def test_runs_killed_at_random_moments_end_alike(
    given: list[str], tmp_path: Path, kills: int
) -> None:
    command = [sys.executable, "-c", KILLER, str(kills), str(tmp_path), *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in range(1, kills + 1):
        assert_equal(tmp_path / str(number), tmp_path / "whole")


@pytest.mark.matrix
def test_two_processes_train_the_adapter_of_one(given: list[str], tmp_path: Path) -> None:
    """The single process takes twice as many batches per step."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[train]'")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, *launch, "-m", "lora_drop_vllm.cli", *given]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert main([*given, "--accumulate", "2", "--out", str(tmp_path / "one")]) == 0
    two, one = (tensors_of(tmp_path / name) for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / name / LOG).read_text().splitlines()]
        for name in ("two", "one")
    ]
    for mine, other in zip(*logs, strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="started as 2 processes, of which 1 would train"):
        Devices()
