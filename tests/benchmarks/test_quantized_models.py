"""The benchmark of quantized copies: their offline twins, and what must hold for a record."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import quantized as benchmark
import torch
from quantized_tiny import quantize, round_inputs
from support import tables
from support.quantized_models import kind_of, open_offline
from tiny import load_model, make_adapter, prompt_of

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.method.adapter import AdapterConfig

NAMES = {"int8": "INT8 (W8A8)", "int4": "INT4 (W4A16)"}


@pytest.mark.parametrize("kind", NAMES)
def test_the_offline_twin_rounds_as_the_kernels_do(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Weights and, in W8A8, what the layers read; its logits are not the unquantized model's."""
    want = load_model(models["qwen2"])
    quantize(want, tmp_path, kind)
    round_inputs(want, kind)
    assert kind_of(tmp_path) == NAMES[kind]
    twin = open_offline(tmp_path)
    tokens = torch.tensor([prompt_of(24)])
    with torch.no_grad():
        logits = [m(tokens).logits for m in (twin, want, load_model(models["qwen2"]))]
    near, far = (float((logits[0] - other).abs().mean()) for other in logits[1:])
    assert near < 1e-4 and far > 0.1, (near, far)


@pytest.mark.parametrize("kind", ["gptq", "fp8"])
def test_other_formats_have_no_twin(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert kind_of(models["qwen2"]) == "FLOAT32"
    quantize(load_model(models["qwen2"]), tmp_path, kind)
    with pytest.raises(ValueError, match=r"as benchmarks/quantize_model\.py writes it"):
        kind_of(tmp_path)


def served_by(model: Any, config: AdapterConfig, adapter: Adapter) -> list[dict[str, Any]]:
    """An answer with the log-probabilities of the offline decode."""
    answer = {"prompt": prompt_of(8), "tokens": prompt_of(12, 1)}
    own = benchmark.log_probabilities(ForcedDecoder(model, adapter), answer, config.k)
    return [answer | {"logprobs": own.tolist()}]


@pytest.mark.parametrize("served", ["int4", "plain"])
def test_a_model_that_is_not_what_the_engine_serves_gives_no_record(
    models: dict[str, Path], tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = make_adapter(tmp_path / "adapter", models["qwen2"], drop_layers=[3, 4])
    adapter = Adapter(config, tensors)
    quantize(load_model(models["qwen2"]), tmp_path / "int4", "int4")
    folders = {"plain": models["qwen2"], "int4": tmp_path / "int4"}
    answers = {
        name: served_by(open_offline(folder), config, adapter) for name, folder in folders.items()
    }
    answers["int4"] = answers[served]
    given = argparse.Namespace(adapter=tmp_path / "adapter", corpus=None, model=folders["plain"])
    windows = torch.tensor([prompt_of(64)])
    monkeypatch.setattr(benchmark, "PROMPT", 16)
    if served == "plain":
        with pytest.raises(RuntimeError, match="the engine serves another model"):
            benchmark.measure_quality(given, folders, config, windows, answers)
        return
    found = benchmark.measure_quality(given, folders, config, windows, answers)
    assert found["int4"]["served_distance"] < found["int4"]["served_distance_plain"] / 2
    base = [found[name]["quality"]["all"]["base_perplexity"] for name in folders]
    assert base[0] != base[1]  # each beside its own base model


@pytest.mark.parametrize(
    ("near", "far", "noise", "serves"),
    [
        (0.05, 0.2, 0.0, True),
        (0.15, 0.2, 0.0, False),
        (0.19, 0.18, 0.18, True),  # as far as the decode is from itself
        (0.30, 0.25, 0.18, False),
        (0.18, 0.04, 0.18, False),  # the plain model
    ],
)
def test_what_an_engine_serves_is_told_from_its_answers(
    near: float, far: float, noise: float, serves: bool
) -> None:
    expected = contextlib.nullcontext() if serves else pytest.raises(RuntimeError, match="another")
    with expected:
        benchmark.check_served(Path("m"), near, far, noise)


def test_speeds_are_over_the_same_model_and_over_the_first() -> None:
    """8-bit steps take half the time; a LoRA step leaves out 40 %, a full step nothing."""

    def times(step: float) -> dict[str, Any]:
        return {
            "stock": [[step] * 8] * 3,
            "k0": [[step] * 8] * 3,
            "lora_drop": [[0.6 * step] * 3 + [step] + [0.6 * step] * 3 + [step]] * 3,
        }

    rounds = {"BF16": times(40.0), "INT8 (W8A8)": times(20.0)}
    models = benchmark.speeds(rounds, 30, [3, 4], 3)
    quality = {"all": {"base_perplexity": 39.1, "perplexity": 49.4, "kl": 0.3, "agreement": 0.6}}
    about = {"served_distance": 0.01, "served_distance_plain": 0.05, "quality": quality}
    written = {
        "benchmark": "quantized",
        "settings": {"adapter": "a", "rho": 0.25, "k": 3},
        "metrics": {"models": [{"model": name} | about | m for name, m in models.items()]},
        "machine": {"cpu": "c", "cores": 2},
    }
    shown = tables.of([json.loads(json.dumps(written))]).splitlines()
    assert shown[-1].startswith(
        "| INT8 (W8A8) | 0.25, 3 | 20.0 → 14.0 | 1.43x ± 0.00 | 2.00x ± 0.00 | 2.86x ± 0.00 | 1.00 "
    )
    assert "| INT8 (W8A8) | a | 39.1 → 49.4 | 0.300 | 60.0% | – | 0.010 / 0.050 |" in shown
