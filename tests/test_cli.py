"""`lora-drop`: check says what fits, errors are one line, the bundled adapter helps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile

import pytest
import tiny
import torch
from oracle import Oracle
from serving import settings_of
from tiny import make_adapter

from lora_drop_vllm.cli import main
from lora_drop_vllm.cli.demo import BUNDLED_ADAPTER
from lora_drop_vllm.method.adapter import load_tensors, read_config

TEXT = (
    "Bees find their way home by the position of the sun. When the sky is covered, they can still "
    "see where the sun is, because the light of the sky is polarised. A bee that has found flowers "
    "tells the others in the hive with a dance how far away they are and in which direction."
)


def test_check_says_what_a_pair_would_save(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, models["llama"], drop_layers=[3, 5])
    assert main(["check", str(models["llama"]), "--adapter", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["drop_layers"] == [3, 5] and facts["k"] == 3
    assert facts["kv_saved_per_generated_token"] == pytest.approx(2 / 8 * 3 / 4, abs=1e-3)
    assert facts["kv_pool_wasted_cpu"] <= 0.03


def test_check_refuses_a_pair_that_does_not_fit(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, models["llama"], drop_layers=[3, 5])
    other = str(models["qwen2"])
    capsys.readouterr()  # a model that is made now shows its progress
    assert main(["check", other, "--adapter", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "made for another model" in error and len(error.splitlines()) == 1


def test_a_reader_that_stops_reading_is_no_error(models: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "lora_drop_vllm.cli", "cost", str(models["llama"])]
    with Popen(command, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_what_cannot_be_written_is_one_line(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    model, out = str(models["llama"]), str(tmp_path / "file" / "sub")
    for command in ("fit", "train", "profile"):
        assert main([command, model, "--corpus", "none.txt", "--out", out]) == 2
        error = capsys.readouterr().err.splitlines()
        assert f"--out {out}: {tmp_path / 'file'} is no folder" in error[-1]
    assert main(["cost", model, "--json", out]) == 2
    assert f"lora-drop: {out}: Not a directory" in capsys.readouterr().err.splitlines()


def test_layers_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value, said in (
        ("--drop-attention", "all", "all: expected layers such as 10-16 or 3,5,9"),
        ("--layers", "16-10", "16-10: expected the lower number first, 10-16"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "model", flag, value, "--out", "out"])
        assert said in capsys.readouterr().err
    assert main(["demo", "--untrained", "--adapter", "folder"]) == 2
    assert "--untrained: --adapter folder would not be used" in capsys.readouterr().err


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr("lora_drop_vllm.plots.require_matplotlib", broken)
    with TemporaryFile("w") as out, pytest.raises(BrokenPipeError, match="worker"):
        monkeypatch.setattr(sys, "stdout", out)
        main(["cost", "model", "--plot", "c.png"])


@pytest.mark.model
def test_the_bundled_adapter_follows_the_base_model_more_closely(real_model: Path) -> None:
    """Teacher-forced through the oracle, on text of our own."""
    from transformers import AutoTokenizer

    model = tiny.load_model(real_model)
    config = read_config(BUNDLED_ADAPTER)
    tensors = load_tensors(BUNDLED_ADAPTER, config)
    zero = {n: torch.ones_like(t) if "gate" in n else 0 * t for n, t in tensors.items()}
    window = AutoTokenizer.from_pretrained(real_model)(TEXT).input_ids

    def divergence(tensors: dict[str, torch.Tensor]) -> float:
        student = Oracle(model, settings_of(config, tensors))
        teacher = Oracle(model, settings_of(config, tensors, drop_layers=[]))
        total = 0.0
        for oracle in (student, teacher):
            oracle.prompt(window[:16])
        for n, token in enumerate(window[16:]):
            for oracle in (student, teacher):
                oracle.tokens[-1] = token
                oracle.step("full" if n % 4 == 3 else "lora")
            p, q = teacher.logits.log_softmax(-1), student.logits.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
        return total

    assert divergence(tensors) < 0.7 * divergence(zero)


def test_cost_counts_what_the_drop_layers_write(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny Llama: 8 layers, 4 eligible; heads are read from its config."""
    flags = ["--rho", "0,0.5", "--k", "1,3", "--prompt", "8", "--tokens", "100"]
    flags += ["--context", "1000"]
    assert main(["cost", str(models["llama"]), *flags, "--json", str(tmp_path / "c.json")]) == 0
    table = json.loads((tmp_path / "c.json").read_text())["rows"]
    rows = {(row["rho"], row["k"]): row for row in table}
    assert rows[0.5, 3]["kv_saved"] == pytest.approx(2 * 75 / (8 * 108))
    assert rows[0.5, 3]["ideal_speed"] == pytest.approx(4 * 8 / (3 * 6 + 8))
    # attention: q, o 128 x 128, k, v 128 x 64, 128 values of KV a token; MLP: 3 x 128 x 256
    attention = 3 * 128 * 128 + 1000 * 128
    layer = attention + 3 * 128 * 256
    expected = 4 * 8 * layer / (3 * (8 * layer - 2 * attention) + 8 * layer)
    assert rows[0.5, 3]["ideal_speed_attention"] == pytest.approx(expected)
    assert rows[0, 3]["kv_saved"] == 0
    config = tiny.load_model(models["llama"]).config
    per_slot = 2 * config.num_key_value_heads * config.head_dim * 2
    assert rows[0, 1]["kv_mb_stock"] == pytest.approx(8 * 108 * per_slot / 1e6)
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: no such model folder, nor one in the local cache"),
        (["--rho", "1.5"], "--rho 1.5: expected 0 to 1"),
        (["--plot", "c.png"], "--plot: matplotlib is not installed; pip install"),
    ],
    ids=["model", "rho", "plot"],
)
def test_what_cannot_be_costed_is_refused(
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    without_matplotlib: None,
    flags: list[str],
    message: str,
) -> None:
    model = [] if flags == ["nowhere"] else [str(models["llama"])]
    assert main(["cost", *model, *flags]) == 2
    assert message in capsys.readouterr().err
