"""Tensors of an adapter, allowed values and the base model: each fact is read from one place."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_adapter

from lora_drop_vllm.config import resolve
from lora_drop_vllm.method.adapter import CONFIG_FILE, BaseModel
from lora_drop_vllm.method.allowed import ALLOWED
from lora_drop_vllm.method.sites import AdapterSites
from lora_drop_vllm.training.settings import Settings

MODEL = BaseModel("llama", 8, 128)
NO_VALUE: dict[str, Any] = {"k": -1, "rho": 1.5, "reuse": "x", "kv": "x", "injection": "x"}


def sites(injection: str, reuse: str) -> AdapterSites:
    return AdapterSites.of([3, 5], injection, reuse, hidden_size=64, rank=4)


def test_names_and_shapes_are_those_of_the_file_format() -> None:
    matrices = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}
    expected = {f"layers.{i}.{name}": shape for i in (3, 5) for name, shape in matrices.items()}
    assert sites("block", "none").shapes() == expected
    expected = {
        f"layers.{i}.{part}.{name}": shape
        for i in (3, 5)
        for part in ("attn", "mlp")
        for name, shape in (matrices | {"gate": (64,)}).items()
    }
    assert sites("attn_mlp", "update").shapes() == expected
    attention = {name: shape for name, shape in expected.items() if ".attn." in name}
    assert sites("attn", "update").shapes() == attention


@pytest.mark.parametrize(
    ("injection", "runs", "whole"),
    [("block", [[3, 4], [6]], 3), ("attn_mlp", [[3, 4], [6]], 3), ("attn", [[3], [4], [6]], 0)],
)
def test_neighbours_chain_unless_an_mlp_runs_between_them(
    injection: str, runs: list[list[int]], whole: int
) -> None:
    of = AdapterSites.of([3, 4, 6], injection, "update", hidden_size=64, rank=4)
    assert of.runs() == runs
    assert (len(of.whole), len(of.attention_only)) == (whole, 3 - whole)
    assert of.layer_of_site == [i for i in (3, 4, 6) for _ in range(2 if "mlp" in injection else 1)]


def test_an_adapter_starts_with_b_zero_and_g_one() -> None:
    for generator in (None, torch.Generator().manual_seed(0)):
        for name, tensor in sites("block", "update").start(generator).items():
            if name.endswith("lora_A.weight") and generator:
                assert float(tensor.std()) == pytest.approx(64**-0.5, rel=0.2)
            else:
                assert tensor.unique().tolist() == [float(name.endswith("gate"))]


def test_layers_of_both_kinds_in_one_adapter() -> None:
    of = AdapterSites.of([7, 3, 4], "attn_mlp", "none", 64, 4, drop_attention=[5, 6])
    assert of.layers == [3, 4, 5, 6, 7] and of.runs() == [[3, 4], [5], [6], [7]]
    assert (of.whole, of.attention_only) == ([3, 4, 7], [5, 6])
    assert of.layer_of_site == [3, 3, 4, 4, 5, 6, 7, 7]
    assert {n for n in of.shapes() if "s.5." in n or "s.7." in n} == {
        f"layers.{part}.lora_{m}.weight" for part in ("5.attn", "7.attn", "7.mlp") for m in "AB"
    }


@pytest.mark.parametrize("injection", ["block", "attn_mlp", "attn"])
@pytest.mark.parametrize("reuse", ["update", "none"])
def test_sites_of_a_layer_go_back_to_their_names(injection: str, reuse: str) -> None:
    of = sites(injection, reuse)
    tensors = {name: torch.rand(shape) for name, shape in of.shapes().items()}
    found: dict[str, torch.Tensor] = {}
    for layer in (3, 5):
        parts = of.of_layer(layer, tensors)
        for site in parts.values():
            assert site.A.shape == (4, 64) and site.B.shape == (64, 4)
            assert (site.gate is None) == (reuse == "none")
        found |= of.named(layer, parts)
    assert list(found) == list(tensors)
    assert all(found[name] is tensors[name] for name in tensors)


@pytest.mark.parametrize("key", ALLOWED)
def test_every_door_refuses_alike(key: str, models: dict[str, Path], tmp_path: Path) -> None:
    config, _ = make_adapter(tmp_path, models["llama"], drop_layers=[3, 5])
    expected = f"expected {re.escape(ALLOWED[key].text)}"
    with pytest.raises(ValueError, match=f"lora_drop.{key}=.*{expected}"):
        resolve({"untrained": True, key: NO_VALUE[key]}, MODEL)
    with pytest.raises(ValueError, match=f"--{key} .*{expected}"):
        replace(Settings(), **{key: NO_VALUE[key]}).check(MODEL)
    raw = json.dumps(asdict(config) | {key: NO_VALUE[key]})
    (tmp_path / CONFIG_FILE).write_text(raw)
    with pytest.raises(ValueError, match=f"{key}=.*{expected}"):
        resolve({"adapter": str(tmp_path)}, MODEL)


@pytest.mark.parametrize("value", [True, None, "3", [], {}, float("nan"), 10**5000], ids=range(7))
def test_an_allowed_value_may_be_asked_of_anything(value: Any) -> None:
    assert not any(value in allowed for allowed in ALLOWED.values())


def test_the_base_model_of_a_config_and_of_its_json(models: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    for family, kind in (("llama", "llama"), ("qwen2", "qwen2")):
        config = transformers.AutoConfig.from_pretrained(models[family])
        raw = json.loads((models[family] / "config.json").read_text())
        assert BaseModel.of(config) == BaseModel.of(raw) == BaseModel(kind, 8, 128)
