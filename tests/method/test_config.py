"""Bad settings and bad adapters raise an error that names the setting, value and way out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_adapter

from lora_drop_vllm.config import LoRADropConfig, resolve
from lora_drop_vllm.method.adapter import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterConfig,
    BaseModel,
    load_tensors,
    read_config,
)

MODEL = BaseModel("llama", 8, 128)
UNTRAINED = {"untrained": True}


@pytest.fixture
def adapter(models: dict[str, Path], tmp_path: Path) -> Path:
    make_adapter(tmp_path / "adapter", models["llama"], drop_layers=[3, 5])
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE)


BAD_SETTINGS = [
    ("adapter", r"expected an object"),
    ({}, r"lora_drop\.adapter: missing; pass --additional-config"),
    ({"adaptor": "x"}, r"lora_drop\.adaptor: unknown setting; allowed: adapter"),
    ({"untrained": True, "adapter": "x"}, r"cannot be combined with an adapter"),
    ({"adapter": "/nowhere"}, r"lora_drop\.adapter='/nowhere': expected a folder"),
    (UNTRAINED | {"k": -1}, r"lora_drop\.k=-1: expected an integer, 0 or more"),
    (UNTRAINED | {"k": 1.5}, r"lora_drop\.k=1\.5: expected an integer"),
    (UNTRAINED | {"k": True}, r"lora_drop\.k=True: expected an integer"),
    (UNTRAINED | {"rho": 1.5}, r"lora_drop\.rho=1\.5: expected 0 <= rho <= 1"),
    (UNTRAINED | {"rho": "half"}, r"lora_drop\.rho='half'"),
    (UNTRAINED | {"reuse": "last"}, r"lora_drop\.reuse='last': expected one of previous"),
    (UNTRAINED | {"kv": "drop"}, r"lora_drop\.kv='drop': expected one of skip, write"),
    (UNTRAINED | {"layers": "best"}, r"lora_drop\.layers='best': expected one of contiguous"),
    (UNTRAINED | {"request_k": "no"}, r"lora_drop\.request_k='no': expected true or false"),
    (UNTRAINED | {"request_k": 1}, r"lora_drop\.request_k=1: .* or \{\"min\": N\}, the lowest k"),
    (UNTRAINED | {"request_k": {"max": 1}}, r"lora_drop\.request_k=\{'max': 1\}: expected true"),
    (UNTRAINED | {"request_k": {"min": True}}, r"lora_drop\.request_k=\{'min': True\}: expected t"),
    (
        UNTRAINED | {"request_k": {"min": -1}},
        r"request_k=\{'min': -1\}: expected true or false",
    ),
    (UNTRAINED | {"k": 1, "request_k": {"min": 2}}, r"expected a floor from 0 to 1, the served k"),
    (UNTRAINED | {"prompts": "later"}, r"lora_drop\.prompts='later': expected one of wait, now"),
    (UNTRAINED | {"drop_layers": [2]}, r"layer 2 cannot drop; of 8 layers the first 3 and the la"),
    (UNTRAINED | {"drop_layers": [7]}, r"layer 7 cannot drop"),
    (UNTRAINED | {"drop_layers": [40]}, r"layer 40 cannot drop"),
    (UNTRAINED | {"drop_layers": [3, 3]}, r"a list of layer numbers, each once"),
    (
        UNTRAINED | {"drop_layers": [3], "rho": 0.5},
        r"cannot be combined with lora_drop\.rho or lora_drop\.layers; leave",
    ),
    (
        UNTRAINED | {"drop_attention": [3], "layers": "uniform"},
        r"lora_drop\.drop_attention: cannot be combined with lora_drop\.rho",
    ),
    (UNTRAINED | {"drop_attention": [2]}, r"drop_attention=\[2\]: layer 2 cannot drop; of 8 la"),
    (UNTRAINED | {"drop_attention": 3}, r"drop_attention=3: expected a list of layer numbers"),
    (
        UNTRAINED | {"drop_attention": [5, 3], "drop_layers": [4, 5]},
        r"drop_attention=\[3, 5\]: layers \[5\] are in lora_drop\.drop_layers too",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(settings, MODEL)


BAD_CONFIGS = [
    ({"colour": 1}, r"unknown key 'colour'; allowed:"),
    ({"k": -1}, r"k=-1: expected an integer, 0 or more"),
    ({"k": "3"}, r"k='3': expected int"),
    ({"rho": 1.5}, r"rho=1\.5: expected 0 <= rho <= 1"),
    ({"rho": 0.9}, r"drop_layers=\[3, 5\]: expected 4 layers"),
    ({"r": 0}, r"r=0: expected a rank"),
    ({"format": 2}, r"format=2: expected 1"),
    ({"peft_type": "LORA"}, r"peft_type='LORA'"),
    ({"reuse": "x"}, r"reuse='x': expected one of"),
    ({"kv": "x"}, r"kv='x': expected one of"),
    ({"injection": "x"}, r"injection='x': expected one of"),
    ({"drop_layers": [5, 3]}, r"expected ascending layer numbers"),
    ({"drop_layers": [2, 3]}, r"the first 3 and the last 1 of 8 always run"),
    ({"drop_layers": [3, 99]}, r"expected ascending layer numbers, each once, from 3 to 6"),
    ({"drop_attention": [4]}, r"drop_layers=\[3, 5\]: expected 2 layers with those of drop_att"),
    ({"drop_attention": [5]}, r"drop_attention=\[5\]: expected none of drop_layers=\[3, 5\]"),
    ({"drop_attention": [6, 4]}, r"drop_attention=\[6, 4\]: expected ascending layer numbers"),
    ({"drop_attention": "4"}, r"drop_attention='4': expected list"),
    ({"head_layers": 2}, r"head_layers=2: expected 3"),
    ({"base_model": {"model_type": "llama"}}, r"missing key 'base_model\."),
    ({"base_model": 3}, r"base_model=3: expected an object"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=str)
def test_bad_adapter_configs(adapter: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        resolve({"adapter": str(adapter)}, MODEL)


def test_an_adapter_config_without_a_key(adapter: Path) -> None:
    raw = json.loads((adapter / CONFIG_FILE).read_text())
    del raw["lora_alpha"]
    (adapter / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="missing key 'lora_alpha'"):
        resolve({"adapter": str(adapter)}, MODEL)


def test_an_adapter_config_that_is_no_json(adapter: Path) -> None:
    (adapter / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve({"adapter": str(adapter)}, MODEL)


NAME = "layers.3.lora_A.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(NAME), r"missing tensor 'layers\.3\.lora_A\.weight'"),
    "extra": (lambda t: t.update({"x": torch.ones(1)}), r"unexpected tensor 'x'"),
    "shape": (
        lambda t: t.update({NAME: t[NAME].T.contiguous()}),
        r"has shape \[128, 4\], expected \[4, 128\]",
    ),
    "nan": (lambda t: t[NAME][0].fill_(float("nan")), r"lora_A\.weight holds NaN or infinite"),
    "inf": (lambda t: t[NAME][0].fill_(float("inf")), r"holds NaN or infinite"),
    "integers": (lambda t: t.update({NAME: t[NAME].int()}), r"is torch\.int32, expected float32"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_adapter_tensors(adapter: Path, case: str) -> None:
    change, message = BAD_TENSORS[case]
    edit_tensors(adapter, change)
    with pytest.raises(ValueError, match=message):
        resolve({"adapter": str(adapter)}, MODEL)


def test_a_pickle_is_never_opened(adapter: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("the pickle was loaded",))

    (adapter / TENSOR_FILE).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a safetensors file"):
        resolve({"adapter": str(adapter)}, MODEL)
    (adapter / TENSOR_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"found adapter_model\.bin, which is never read"):
        resolve({"adapter": str(adapter)}, MODEL)


def test_an_adapter_of_another_model(adapter: Path) -> None:
    for other in (
        BaseModel("qwen2", 8, 128),
        BaseModel("llama", 9, 128),
        BaseModel("llama", 8, 64),
    ):
        with pytest.raises(ValueError, match="made for another model"):
            resolve({"adapter": str(adapter)}, other)


def test_settings_override_the_adapter_where_they_may(adapter: Path) -> None:
    given = {"adapter": str(adapter), "k": 7, "drop_layers": [5], "reuse": "none", "kv": "write"}
    config = resolve(given, MODEL)
    assert (config.k, config.drop_layers, config.reuse, config.kv) == (7, (5,), "none", "write")
    assert LoRADropConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    fewer = resolve({"adapter": str(adapter), "rho": 0.25, "layers": "uniform"}, MODEL)
    assert len(fewer.drop_layers) == 1
    with pytest.raises(
        ValueError,
        match=r"layer 4 is not one of the adapter's drop layers; expected a subset of \[3, 5\]",
    ):
        resolve({"adapter": str(adapter), "drop_layers": [3, 4]}, MODEL)
    with pytest.raises(
        ValueError, match="but there are only 2 of the adapter's drop layers; lower rho"
    ):
        resolve({"adapter": str(adapter), "rho": 0.75}, MODEL)
    with pytest.raises(ValueError, match=r"lora_drop\.r=8: the adapter decides it"):
        resolve({"adapter": str(adapter), "r": 8}, MODEL)


def test_settings_select_layers_of_both_kinds(models: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(tmp_path, models["llama"], drop_layers=[3, 6], drop_attention=[4, 5])
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["drop_attention"] == [4, 5]

    def lists(**given: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config = resolve({"adapter": str(tmp_path)} | given, MODEL)
        assert LoRADropConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
        assert config.sites.layers == sorted(config.drop_layers + config.drop_attention)
        assert config.rho == len(config.sites.layers) / 4
        return config.drop_layers, config.drop_attention

    assert lists() == ((3, 6), (4, 5))
    assert lists(drop_layers=[6]) == ((6,), (4, 5))
    assert lists(drop_attention=[]) == ((3, 6), ())
    assert lists(drop_layers=[], drop_attention=[5]) == ((), (5,))
    assert lists(rho=0.75, layers="contiguous") == ((3,), (4, 5))
    with pytest.raises(
        ValueError, match=r"layer 3 is not one of the layers of which the adapter drops the atten"
    ):
        lists(drop_attention=[3])
    untrained = resolve({"untrained": True, "drop_attention": [5, 4]}, MODEL)
    assert (untrained.drop_layers, untrained.drop_attention) == ((), (4, 5))


def test_an_adapter_without_attention_layers_is_a_file_of_older_versions(adapter: Path) -> None:
    assert "drop_attention" not in json.loads((adapter / CONFIG_FILE).read_text())
    assert read_config(adapter).drop_attention == []


def test_what_an_operator_decides_for_all_requests(adapter: Path) -> None:
    for base in (UNTRAINED, {"adapter": str(adapter)}):
        assert (resolve(base, MODEL).prompts, resolve(base, MODEL).least_k) == ("wait", 0)
        assert resolve(base | {"prompts": "now"}, MODEL).prompts == "now"
        for allowed, least in ((True, 0), (False, None), ({"min": 2}, 2), ({"min": 0}, 0)):
            config = resolve(base | {"request_k": allowed}, MODEL)
            assert config.least_k == least
            assert LoRADropConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_a_rule_that_needs_gates_needs_an_adapter_with_gates(
    models: dict[str, Path], tmp_path: Path
) -> None:
    make_adapter(tmp_path, models["llama"], drop_layers=[4], reuse="anchor")
    assert resolve({"adapter": str(tmp_path), "reuse": "previous"}, MODEL).reuse == "previous"
    with pytest.raises(ValueError, match="needs gates, which this adapter"):
        resolve({"adapter": str(tmp_path), "reuse": "update"}, MODEL)


def test_k_or_rho_of_zero_switch_the_method_off() -> None:
    assert not resolve(UNTRAINED | {"k": 0}, MODEL).active
    assert not resolve(UNTRAINED | {"rho": 0}, MODEL).active
    assert resolve(UNTRAINED, MODEL).active


def test_what_is_saved_is_what_is_read(adapter: Path) -> None:
    config = read_config(adapter)
    assert isinstance(config, AdapterConfig) and config.scale == 2.0
    assert set(load_tensors(adapter, config)) == set(load_file(adapter / TENSOR_FILE))
