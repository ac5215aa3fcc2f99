"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, strictly checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_drop_vllm.atomic_files import replacing
from lora_drop_vllm.method.adapter_folder import AdapterError, file_in, read_json, shown
from lora_drop_vllm.method.allowed import ALLOWED
from lora_drop_vllm.method.layers import (
    HEAD_LAYERS,
    TAIL_LAYERS,
    eligible_layers,
    num_drop_layers,
)
from lora_drop_vllm.method.sites import AdapterSites

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PEFT_TYPE = "LORA_DROP"
FORMAT = 1
MAX_LAYERS = 10_000  # of a base model; checked before any list of layers is built
MAX_ALPHA = 1e30  # finite in fp32, whatever the rank
OPTIONAL = ("drop_attention",)  # keys that a file may lack
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BaseModel:
    """The facts about a model that must be the same for its adapters."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int

    @classmethod
    def of(cls, config: Any) -> BaseModel:
        """The base model of a Hugging Face config, or of the object in a `config.json`."""
        if isinstance(config, Mapping):
            return cls(*(config[field.name] for field in fields(cls)))
        text = config.get_text_config()
        return cls(*(getattr(text, field.name) for field in fields(cls)))

    def __str__(self) -> str:
        return f"{self.model_type}, {self.num_hidden_layers} layers of width {self.hidden_size}"


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of `adapter_config.json`, under the same names.

    Attributes:
        drop_layers: the layers that drop, whole or as `injection` says
        drop_attention: further layers, of which only the attention drops
    """

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
    drop_attention: list[int] = field(default_factory=list)
    head_layers: int = HEAD_LAYERS
    tail_layers: int = TAIL_LAYERS
    peft_type: str = PEFT_TYPE
    format: int = FORMAT

    @property
    def scale(self) -> float:
        """The factor of B A, alpha / r, as in PEFT."""
        return self.lora_alpha / self.r

    @property
    def dropped(self) -> str:
        """The drop layers, as results name them."""
        attention = f", attention of {self.drop_attention}" if self.drop_attention else ""
        return f"drop layers {self.drop_layers}{attention}"

    @property
    def sites(self) -> AdapterSites:
        """The sites and their tensors."""
        d = self.base_model.hidden_size
        return AdapterSites.of(
            self.drop_layers, self.injection, self.reuse, d, self.r, self.drop_attention
        )


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an adapter folder that `read_config` and `load_tensors` accept; `dtype` converts."""
    tensors = {name: t.detach().cpu().to(dtype or t.dtype) for name, t in tensors.items()}
    check_tensors(folder, config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    # a folder in use never holds half a file, nor a new config beside old tensors
    with replacing(folder / CONFIG_FILE) as text, replacing(folder / TENSOR_FILE) as weights:
        text.write_text(json.dumps(_in_file(config), indent=2) + "\n")
        save_file({name: t.contiguous() for name, t in tensors.items()}, weights)
        weights.chmod(text.stat().st_mode)  # safetensors lets only the owner read


def _in_file(config: AdapterConfig) -> dict[str, Any]:
    """A config without the optional keys that are empty; older versions read it, too."""
    return {key: value for key, value in asdict(config).items() if value or key not in OPTIONAL}


def read_config(folder: Path) -> AdapterConfig:
    """Reads and checks `adapter_config.json`.

    Raises:
        AdapterError: there is no such folder or file, a link leads out of the folder, it is not
            JSON, keys are missing, unknown or repeated, or a value is out of range.
    """
    path = file_in(folder, CONFIG_FILE)
    if path is None:
        raise AdapterError(
            f"lora_drop.adapter={shown(str(folder))}: expected a folder with {CONFIG_FILE} and "
            f"{TENSOR_FILE}; there is no {CONFIG_FILE} in it."
        )
    return _parse_config(path, read_json(path))


def load_tensors(folder: Path, config: AdapterConfig) -> dict[str, Tensor]:
    """Reads and checks `adapter_model.safetensors`; no other format is ever opened.

    Raises:
        AdapterError: there is no such file, a link leads out of the folder, it is not safetensors,
            tensors are missing or extra, have a wrong shape or dtype, or are not finite.
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
    """Raises AdapterError unless the tensors are exactly those that the config describes."""
    expected = config.sites.shapes()
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
    _check_fields(path, "", AdapterConfig, raw)
    _check_fields(path, "base_model.", BaseModel, raw["base_model"])
    config = AdapterConfig(**raw | {"base_model": BaseModel(**raw["base_model"])})
    _check_values(path, config)
    return config


# fields whose type has another name in JSON: its types there, and what an error calls them
_IN_JSON: dict[Any, tuple[tuple[type, ...], str]] = {
    float: ((int, float), "int or float"),
    list[int]: ((list,), "list"),
    BaseModel: ((dict,), "an object"),
}


def _check_fields(path: Path, prefix: str, kind: type, raw: dict[str, Any]) -> None:
    """Raises AdapterError unless the keys and types are those of a dataclass."""
    hints = get_type_hints(kind)
    if missing := sorted(hints.keys() - raw.keys() - set(OPTIONAL)):
        raise AdapterError(f"{path}: missing key {prefix + missing[0]!r}.")
    if unknown := sorted(raw.keys() - hints.keys()):
        raise AdapterError(
            f"{path}: unknown key {shown(prefix + unknown[0])}; allowed: "
            f"{', '.join(sorted(hints))}."
        )
    for key, hint in hints.items():
        if key not in raw:
            continue
        types, name = _IN_JSON.get(hint, ((hint,), hint.__name__))
        if not isinstance(raw[key], types) or isinstance(raw[key], bool):
            raise AdapterError(f"{path}: {prefix}{key}={shown(raw[key])}: expected {name}.")


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
    for key, allowed in ALLOWED.items():
        require(getattr(config, key) in allowed, key, allowed.text)
    require(config.head_layers == HEAD_LAYERS, "head_layers", str(HEAD_LAYERS))
    require(config.tail_layers == TAIL_LAYERS, "tail_layers", str(TAIL_LAYERS))
    num_layers = base.num_hidden_layers
    eligible = eligible_layers(num_layers)
    for key in ("drop_layers", "drop_attention"):
        layers = getattr(config, key)
        require(
            all(type(i) is int for i in layers)
            and sorted(set(layers)) == layers
            and set(layers) <= set(eligible),
            key,
            f"ascending layer numbers, each once, from {_span(eligible)} (the first {HEAD_LAYERS} "
            f"and the last {TAIL_LAYERS} of {num_layers} always run)",
        )
    require(
        not set(config.drop_layers) & set(config.drop_attention),
        "drop_attention",
        f"none of drop_layers={config.drop_layers}",
    )
    count = num_drop_layers(config.rho, num_layers)
    require(
        len(config.sites.layers) == count,
        "drop_layers",
        f"{count} layers with those of drop_attention, what rho={config.rho} gives for "
        f"{len(eligible)} eligible ones",
    )


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "nothing"
