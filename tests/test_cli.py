"""`lora-drop`: check says what fits, errors are one line, fit makes an adapter that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from serving import settings_of
from tiny import VOCAB, make_adapter

from lora_drop_vllm.cli import main
from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.offline.fit import Schedule, fit_tensors


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
    assert main(["check", str(models["qwen2"]), "--adapter", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "made for another model" in error and len(error.splitlines()) == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "check", "fit"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "examples:" in capsys.readouterr().out


def test_schedule_of_a_window_is_the_served_one() -> None:
    schedule = Schedule.of(12, 4, 2)
    assert schedule.full.int().tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert schedule.anchor.tolist() == [0, 1, 2, 3, 3, 3, 6, 6, 6, 9, 9, 9]


@pytest.mark.parametrize("reuse", ["anchor", "update", "none"])
@pytest.mark.parametrize("kv", ["skip", "write"])
def test_a_fitted_adapter_follows_the_base_model_more_closely(
    hf_models: dict[str, Any], reuse: str, kv: str
) -> None:
    """Teacher-forced through the oracle: less divergence from the base model."""
    model = hf_models["llama"]
    base = BaseModel("llama", 8, 128)
    config = AdapterConfig("", base, 16, 16.0, 0.5, 3, [3, 5], reuse, kv, "block")
    batch = torch.randint(3, VOCAB, (24, 64))
    fitted = fit_tensors(model, batch, config, Schedule.of(64, 16, 3))
    zero = {n: torch.ones_like(t) if "gate" in n else 0 * t for n, t in fitted.items()}
    window = torch.randint(3, VOCAB, (40,)).tolist()

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

    assert divergence(fitted) < 0.9 * divergence(zero)
