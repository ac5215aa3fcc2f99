"""The one door for settings: `--additional-config '{"lora_drop": {...}}'`, read only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.method.adapter import MAX_K, BaseModel, load_tensors, read_config
from lora_drop_vllm.method.adapter_folder import shown
from lora_drop_vllm.method.layers import (
    CHOICES,
    choose_layers,
    eligible_layers,
    num_drop_layers,
)
from lora_drop_vllm.method.reuse import KV_MODES, REUSE, SITES
from lora_drop_vllm.method.schedule import PROMPTS

HELP = (
    'pass --additional-config \'{"lora_drop": {"adapter": "DIR"}}\', or for a speed test without '
    'an adapter \'{"lora_drop": {"untrained": true, "rho": 0.5, "k": 3}}\''
)


class LoRADropConfigError(ValueError):
    """Settings that cannot be served; the message names the setting, its value and the way out."""


@dataclass(frozen=True)
class LoRADropConfig:
    """Settings after every default, override and check; made once and passed down.

    Attributes:
        adapter: adapter folder, or None for B = 0 and g = 1 (`untrained`)
        rank, scale: r and alpha / r
        prompts: `wait` or `now`, whether arriving prompts wait for the next full step
        least_k: the lowest k that a request may bring; None where it may bring none
    """

    adapter: str | None
    num_layers: int
    hidden_size: int
    drop_layers: tuple[int, ...]
    k: int
    reuse: str
    kv: str
    injection: str
    rank: int
    scale: float
    prompts: str = PROMPTS[0]
    least_k: int | None = 0

    @property
    def rho(self) -> float:
        """Share of the eligible layers that drop."""
        return len(self.drop_layers) / max(len(eligible_layers(self.num_layers)), 1)

    @property
    def active(self) -> bool:
        """Whether any layer ever drops; otherwise the stock model is served."""
        return self.k > 0 and bool(self.drop_layers)

    @property
    def kv_skips(self) -> bool:
        """Whether LoRA steps leave holes in the drop layers' KV."""
        return self.kv == "skip"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for the engine's config: its hash then covers all that we compile in."""
        return asdict(self) | {"drop_layers": list(self.drop_layers)}

    @classmethod
    def from_dict(cls, resolved: Mapping[str, Any]) -> LoRADropConfig:
        """Inverse of `as_dict`, for the engine's other processes."""
        return cls(**{**resolved, "drop_layers": tuple(resolved["drop_layers"])})


_KEYS = (
    "adapter",
    "untrained",
    "k",
    "rho",
    "layers",
    "drop_layers",
    "reuse",
    "kv",
    "injection",
    "r",
    "prompts",
    "request_k",
)
_UNTRAINED_ONLY = ("injection", "r")
_UNTRAINED = {"k": 3, "rho": 0.5, "reuse": "update", "kv": "skip", "injection": "block", "r": 16}


def resolve(settings: Any, model: BaseModel) -> LoRADropConfig:
    """Check the user's settings against a model and fill in what they leave open.

    Args:
        settings: the value of `lora_drop`
        model: the model that is to be served

    Raises:
        LoRADropConfigError: for every setting that cannot be served as written.
        AdapterError: when the adapter itself is at fault.
    """
    if not isinstance(settings, Mapping):
        raise LoRADropConfigError(f"lora_drop={shown(settings)}: expected an object; {HELP}.")
    if unknown := sorted(str(key) for key in settings if key not in _KEYS):
        raise LoRADropConfigError(
            f"lora_drop.{unknown[0][:200]}: unknown setting; allowed: {', '.join(_KEYS)}."
        )
    _check_types(settings)
    if settings.get("untrained", False):
        if "adapter" in settings:
            raise LoRADropConfigError(
                "lora_drop.untrained=true: cannot be combined with an adapter; drop one of them."
            )
        return _resolve_untrained({**_UNTRAINED, **settings}, settings, model)
    if "adapter" not in settings:
        raise LoRADropConfigError(f"lora_drop.adapter: missing; {HELP}.")
    return _resolve_adapter(settings, model)


def _resolve_untrained(
    merged: Mapping[str, Any], settings: Mapping[str, Any], model: BaseModel
) -> LoRADropConfig:
    eligible = eligible_layers(model.num_hidden_layers)
    if merged["r"] > model.hidden_size:
        raise LoRADropConfigError(
            f"lora_drop.r={merged['r']}: expected at most the model's width, {model.hidden_size}."
        )
    layers = _drop_layers(settings, model, eligible, "eligible layers")
    if layers is None:
        layers = choose_layers(
            merged.get("layers", CHOICES[0]),
            num_drop_layers(merged["rho"], model.num_hidden_layers),
            eligible,
        )
    return LoRADropConfig(
        adapter=None,
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        drop_layers=tuple(layers),
        k=merged["k"],
        reuse=merged["reuse"],
        kv=merged["kv"],
        injection=merged["injection"],
        rank=merged["r"],
        scale=1.0,
        **_for_requests(settings, merged["k"]),
    )


def _resolve_adapter(settings: Mapping[str, Any], model: BaseModel) -> LoRADropConfig:
    for key in _UNTRAINED_ONLY:
        if key in settings:
            raise LoRADropConfigError(
                f"lora_drop.{key}={shown(settings[key])}: the adapter decides it; leave it out."
            )
    folder = Path(settings["adapter"])
    adapter = read_config(folder)
    if adapter.base_model != model:
        raise LoRADropConfigError(
            f"lora_drop.adapter={str(folder)!r}: made for another model ({adapter.base_model}); "
            f"this one is {model}. Use the adapter of this model."
        )
    load_tensors(folder, adapter)
    reuse = settings.get("reuse", adapter.reuse)
    if REUSE[reuse].difference and not REUSE[adapter.reuse].difference:
        raise LoRADropConfigError(
            f"lora_drop.reuse={reuse!r}: needs gates, which this adapter (reuse "
            f"{adapter.reuse!r}) lacks; use another rule or an adapter trained with {reuse!r}."
        )
    layers = _drop_layers(settings, model, adapter.drop_layers, "the adapter's drop layers")
    k = settings.get("k", adapter.k)
    return LoRADropConfig(
        adapter=str(folder.resolve()),
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        drop_layers=tuple(adapter.drop_layers if layers is None else layers),
        k=k,
        reuse=reuse,
        kv=settings.get("kv", adapter.kv),
        injection=adapter.injection,
        rank=adapter.r,
        scale=adapter.scale,
        **_for_requests(settings, k),
    )


def _for_requests(settings: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What an operator decides for all requests: `prompts`, and `request_k` as `least_k`."""
    allowed = settings.get("request_k", True)
    least = allowed["min"] if isinstance(allowed, Mapping) else 0 if allowed else None
    if least is not None and not 0 <= least <= k:
        raise LoRADropConfigError(
            f"lora_drop.request_k={shown(allowed)}: expected a floor from 0 to {k}, the served k."
        )
    return {"prompts": settings.get("prompts", PROMPTS[0]), "least_k": least}


def _drop_layers(
    settings: Mapping[str, Any], model: BaseModel, candidates: list[int], named: str
) -> list[int] | None:
    """D from `drop_layers`, or from `rho` and `layers`; None when the settings name neither."""
    if "drop_layers" in settings:
        if "rho" in settings or "layers" in settings:
            raise LoRADropConfigError(
                "lora_drop.drop_layers: says it all; leave out lora_drop.rho and lora_drop.layers."
            )
        layers = sorted(settings["drop_layers"])
        eligible = eligible_layers(model.num_hidden_layers)
        for layer in layers:
            if layer not in eligible:
                raise LoRADropConfigError(
                    f"lora_drop.drop_layers={layers}: layer {layer} cannot drop; of "
                    f"{model.num_hidden_layers} layers the first 3 and the last 1 always run, so "
                    f"allowed are {eligible}."
                )
            if layer not in candidates:
                raise LoRADropConfigError(
                    f"lora_drop.drop_layers={layers}: layer {layer} is not among {named} "
                    f"({candidates}), which may only become fewer."
                )
        return layers
    if "rho" not in settings:
        if "layers" in settings and "adapter" in settings:
            raise LoRADropConfigError(
                f"lora_drop.layers={settings['layers']!r}: needs lora_drop.rho beside it."
            )
        return None
    count = num_drop_layers(settings["rho"], model.num_hidden_layers)
    if count > len(candidates):
        raise LoRADropConfigError(
            f"lora_drop.rho={settings['rho']}: would drop {count} layers, but {named} are only "
            f"{len(candidates)} and may only become fewer; lower rho."
        )
    return choose_layers(settings.get("layers", CHOICES[0]), count, candidates)


def _check_types(settings: Mapping[str, Any]) -> None:
    def is_int(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_K

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def layer_list(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_int, value)) and len(set(value)) == len(value)

    def is_floor(value: Any) -> bool:
        return isinstance(value, Mapping) and [*value] == ["min"] and is_int(value["min"])

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "adapter": (lambda v: isinstance(v, str) and bool(v), "the path of an adapter folder"),
        "untrained": (lambda v: isinstance(v, bool), "true or false"),
        "k": (
            lambda v: is_int(v) and v >= 0,
            f"an integer, 0 or more (0 switches LoRA-Drop off), at most {MAX_K}",
        ),
        "rho": (
            lambda v: is_number(v) and 0 <= v <= 1,
            "0 <= rho <= 1, the fraction of eligible layers to drop; write 0.5 for 50 %",
        ),
        "layers": (lambda v: v in CHOICES, f"one of {', '.join(CHOICES)}"),
        "drop_layers": (layer_list, "a list of layer numbers, each once"),
        "reuse": (lambda v: isinstance(v, str) and v in REUSE, f"one of {', '.join(REUSE)}"),
        "kv": (lambda v: v in KV_MODES, f"one of {', '.join(KV_MODES)}"),
        "injection": (lambda v: isinstance(v, str) and v in SITES, f"one of {', '.join(SITES)}"),
        "r": (lambda v: is_int(v) and v >= 1, "a rank of at least 1"),
        "prompts": (lambda v: v in PROMPTS, f"one of {', '.join(PROMPTS)}"),
        "request_k": (
            lambda v: isinstance(v, bool) or is_floor(v),
            'true or false (whether a request may lower its own k by lora_drop_k), or {"min": N}, '
            "the lowest k that it may bring",
        ),
    }
    for key, value in settings.items():
        ok, allowed = checks[key]
        if not ok(value):
            raise LoRADropConfigError(f"lora_drop.{key}={shown(value)}: expected {allowed}.")
