"""`lora-drop`: check says what fits, errors are one line, fit makes an adapter that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from oracle import Oracle
from serving import settings_of
from tiny import make_adapter

from lora_drop_vllm.cli import main
from lora_drop_vllm.demo import BUNDLED_ADAPTER
from lora_drop_vllm.method.adapter import (
    AdapterConfig,
    BaseModel,
    load_tensors,
    read_config,
    save_adapter,
)
from lora_drop_vllm.offline.fit import _fit_layer, fit_tensors

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
    assert main(["check", str(models["qwen2"]), "--adapter", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "made for another model" in error and len(error.splitlines()) == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "check", "fit", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("reuse", ["anchor", "update", "none"])
def test_a_fitted_layer_is_nearer_to_its_target(reuse: str) -> None:
    """Where a map of rank 4 and a gate are all there is, they are found."""
    config = AdapterConfig(
        "", BaseModel("llama", 8, 32), 4, 8.0, 0.5, 3, [3], reuse, "skip", "block"
    )
    x, kept, noise = (torch.randn(400, 32) for _ in range(3))
    low = torch.randn(32, 4) @ torch.randn(4, 32) / 8
    gate = torch.rand(32)
    term = {"anchor": kept, "update": x + gate * kept, "none": x}[reuse]
    target = term + x @ low + 0.01 * noise
    A, B, fitted = _fit_layer(x, target, kept if reuse != "none" else 0 * kept, config)
    assert A.shape == (4, 32) and B.shape == (32, 4)
    term = {"anchor": kept, "update": x if fitted is None else x + fitted * kept, "none": x}[reuse]
    update = term + config.scale * x @ A.T @ B.T
    assert (update - target).std() < 0.1 * (term - target).std()
    if reuse == "update":
        torch.testing.assert_close(fitted, gate, atol=0.2, rtol=0)


def test_fit_writes_an_adapter_that_loads(models: dict[str, Path], tmp_path: Path) -> None:
    from lora_drop_vllm.config import resolve

    model = tiny.load_model(models["llama"])
    base = BaseModel("llama", 8, 128)
    config = AdapterConfig("", base, 4, 4.0, 0.5, 3, [3, 5], "update", "skip", "block")
    batch = torch.randint(3, tiny.VOCAB, (4, 64))
    save_adapter(tmp_path, config, fit_tensors(model, batch, config, 16))
    assert resolve({"adapter": str(tmp_path)}, base).drop_layers == (3, 5)


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
