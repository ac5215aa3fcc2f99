"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, strictly checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_drop_vllm.atomic_files import replacing
from lora_drop_vllm.method.adapter_folder import AdapterError, file_in, read_json, shown
from lora_drop_vllm.method.layers import (
    HEAD_LAYERS,
    TAIL_LAYERS,
    eligible_layers,
    num_drop_layers,
)
from lora_drop_vllm.method.reuse import KV_MODES, REUSE, SITES

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PEFT_TYPE = "LORA_DROP"
FORMAT = 1
MAX_LAYERS = 10_000  # of a base model; lists of layers are built before anything is compared
MAX_K = 2**31 - 1
MAX_ALPHA = 1e30  # finite in fp32, whatever the rank
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BaseModel:
    """What an adapter must agree on with the model it was trained for."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.model_type}, {self.num_hidden_layers} layers of width {self.hidden_size}"


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of `adapter_config.json`, in its own names."""

    base_model_name_or_path: str
    base_model: BaseModel
    r: int
    lora_alpha: float
    rho: float
    k: int
    drop_layers: list[int]
    reuse: str
    kv: str
    injection: str
    head_layers: int = HEAD_LAYERS
    tail_layers: int = TAIL_LAYERS
    peft_type: str = PEFT_TYPE
    format: int = FORMAT

    @property
    def scale(self) -> float:
        """The factor before B A, alpha / r, as in PEFT."""
        return self.lora_alpha / self.r


def tensor_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of exactly the tensors that belong to an adapter."""
    d, r = config.base_model.hidden_size, config.r
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.drop_layers:
        for site in SITES[config.injection]:
            prefix = tensor_prefix(layer, site)
            shapes[f"{prefix}.lora_A.weight"] = (r, d)
            shapes[f"{prefix}.lora_B.weight"] = (d, r)
            if REUSE[config.reuse].difference:
                shapes[f"{prefix}.gate"] = (d,)
    return shapes


def tensor_prefix(layer: int, site: str) -> str:
    """`layers.{i}`, or with `injection: attn_mlp` `layers.{i}.attn` and `layers.{i}.mlp`."""
    return f"layers.{layer}.{site}" if site else f"layers.{layer}"


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter folder that `read_config` and `load_tensors` accept, in `dtype` if given."""
    tensors = {name: t.detach().cpu().to(dtype or t.dtype) for name, t in tensors.items()}
    check_tensors(folder, config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    # a folder in use never holds half a file, and a new config only beside its tensors
    with replacing(folder / CONFIG_FILE) as text, replacing(folder / TENSOR_FILE) as weights:
        text.write_text(json.dumps(asdict(config), indent=2) + "\n")
        save_file({name: t.contiguous() for name, t in tensors.items()}, weights)
        weights.chmod(text.stat().st_mode)  # safetensors lets only the owner read


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`.

    Raises:
        AdapterError: no such folder or file, a link out of the folder, not JSON, missing, unknown
            or repeated keys, values out of range.
    """
    path = file_in(folder, CONFIG_FILE)
    if path is None:
        raise AdapterError(
            f"lora_drop.adapter={shown(str(folder))}: expected a folder with {CONFIG_FILE} and "
            f"{TENSOR_FILE}; there is no {CONFIG_FILE} in it."
        )
    return _parse_config(path, read_json(path))


def load_tensors(folder: Path, config: AdapterConfig) -> dict[str, Tensor]:
    """Read and check `adapter_model.safetensors`; nothing but safetensors is ever opened.

    Raises:
        AdapterError: no such file, a link out of the folder, not safetensors, missing or extra
            tensors, wrong shapes or dtypes, values that are not finite.
    """
    path = file_in(folder, TENSOR_FILE)
    if path is None:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f" (found {', '.join(others)}, which is never read)" if others else ""
        raise AdapterError(
            f"{folder}: there is no {TENSOR_FILE}{found}; convert the adapter to safetensors."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path}: not a safetensors file ({error}); only safetensors is read."
        ) from error
    check_tensors(path, config, tensors)
    return tensors


def check_tensors(where: Path | str, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless the tensors are exactly those that the config describes."""
    expected = tensor_shapes(config)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise AdapterError(
            f"{where}: missing tensor {missing[0]!r} ({len(missing)} missing); expected exactly "
            f"the tensors that {CONFIG_FILE} describes."
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise AdapterError(
            f"{where}: unexpected tensor {shown(extra[0])} ({len(extra)} extra); expected exactly "
            f"the tensors that {CONFIG_FILE} describes."
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)}."
            )
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"{where}: {name} is {tensor.dtype}, expected float32, bfloat16 or float16."
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{where}: {name} holds NaN or infinite values; train or export it again."
            )


def _parse_config(path: Path, raw: Any) -> AdapterConfig:
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(raw).__name__}.")
    raw = dict(raw)
    _check_keys(path, "", raw, {f.name for f in fields(AdapterConfig)})
    base = raw.pop("base_model")
    if not isinstance(base, dict):
        raise AdapterError(f"{path}: base_model={shown(base)}: expected an object.")
    _check_keys(path, "base_model.", base, {f.name for f in fields(BaseModel)})
    for key, kind in _BASE_TYPES.items():
        _check_type(path, f"base_model.{key}", base[key], kind)
    for key, kind in _TYPES.items():
        _check_type(path, key, raw[key], kind)
    config = AdapterConfig(base_model=BaseModel(**base), **raw)
    _check_values(path, config)
    return config


_BASE_TYPES = {"model_type": str, "num_hidden_layers": int, "hidden_size": int}
_TYPES: dict[str, Any] = {
    "peft_type": str,
    "format": int,
    "base_model_name_or_path": str,
    "r": int,
    "lora_alpha": (int, float),
    "rho": (int, float),
    "k": int,
    "drop_layers": list,
    "head_layers": int,
    "tail_layers": int,
    "reuse": str,
    "kv": str,
    "injection": str,
}


def _check_keys(path: Path, prefix: str, raw: dict[str, Any], expected: set[str]) -> None:
    if missing := sorted(expected - raw.keys()):
        raise AdapterError(f"{path}: missing key {prefix + missing[0]!r}.")
    if unknown := sorted(raw.keys() - expected):
        raise AdapterError(
            f"{path}: unknown key {shown(prefix + unknown[0])}; allowed: "
            f"{', '.join(sorted(expected))}."
        )


def _check_type(path: Path, key: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise AdapterError(f"{path}: {key}={shown(value)}: expected {names}.")


def _check_values(path: Path, config: AdapterConfig) -> None:
    def require(ok: bool, key: str, allowed: str) -> None:
        if not ok:
            value = shown(getattr(config, key))
            raise AdapterError(f"{path}: {key}={value}: expected {allowed}.")

    base = config.base_model
    require(
        1 <= base.num_hidden_layers <= MAX_LAYERS and base.hidden_size >= 1,
        "base_model",
        f"num_hidden_layers from 1 to {MAX_LAYERS} and a positive hidden_size",
    )

    require(config.peft_type == PEFT_TYPE, "peft_type", repr(PEFT_TYPE))
    require(config.format == FORMAT, "format", f"{FORMAT}, the only format there is")
    require(1 <= config.r <= base.hidden_size, "r", "a rank from 1 to hidden_size")
    require(abs(config.lora_alpha) <= MAX_ALPHA, "lora_alpha", "a finite number")
    require(
        0 <= config.k <= MAX_K, "k", f"0 or more LoRA steps between two full steps, at most {MAX_K}"
    )
    require(0 <= config.rho <= 1, "rho", "0 <= rho <= 1, the share of eligible layers that drop")
    require(config.reuse in REUSE, "reuse", f"one of {', '.join(REUSE)}")
    require(config.kv in KV_MODES, "kv", f"one of {', '.join(KV_MODES)}")
    require(config.injection in SITES, "injection", f"one of {', '.join(SITES)}")
    require(config.head_layers == HEAD_LAYERS, "head_layers", str(HEAD_LAYERS))
    require(config.tail_layers == TAIL_LAYERS, "tail_layers", str(TAIL_LAYERS))
    num_layers = base.num_hidden_layers
    allowed = eligible_layers(num_layers)
    require(
        all(type(i) is int for i in config.drop_layers)
        and sorted(set(config.drop_layers)) == config.drop_layers
        and set(config.drop_layers) <= set(allowed),
        "drop_layers",
        f"ascending layer numbers, each once, from {_span(allowed)} (the first {HEAD_LAYERS} and "
        f"the last {TAIL_LAYERS} of {num_layers} always run)",
    )
    count = num_drop_layers(config.rho, num_layers)
    require(
        len(config.drop_layers) == count,
        "drop_layers",
        f"{count} layers, what rho={config.rho} gives for {len(allowed)} eligible ones",
    )


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "nothing"
