"""The one door for settings: `--additional-config '{"lora_drop": {...}}'`, read only here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import MAX_LAYERS, BaseModel, load_tensors, read_config
from lora_drop_vllm.method.adapter_folder import shown
from lora_drop_vllm.method.allowed import ALLOWED, Allowed
from lora_drop_vllm.method.layers import CHOICES, eligible_layers
from lora_drop_vllm.method.reuse import REUSE
from lora_drop_vllm.method.schedule import PROMPTS
from lora_drop_vllm.method.selection import DropLists, select
from lora_drop_vllm.method.sites import AdapterSites

MODEL_IMPL = "lora_drop"  # the value of --model-impl
SETTINGS = "lora_drop"  # the key in --additional-config
HELP = (
    'pass --additional-config \'{"lora_drop": {"adapter": "DIR"}}\', or for a speed test without '
    'an adapter \'{"lora_drop": {"untrained": true, "rho": 0.5, "k": 3}}\''
)


class LoRADropConfigError(ValueError):
    """Settings that cannot be served; the message names setting, value and the way out."""


@dataclass(frozen=True)
class LoRADropConfig:
    """The settings after all defaults, overrides and checks; made once and passed down.

    Attributes:
        adapter: adapter folder, or None for B = 0 and g = 1 (`untrained`)
        drop_layers: the layers that drop, whole or as `injection` says
        drop_attention: further layers, of which only the attention drops
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
    drop_attention: tuple[int, ...] = ()
    prompts: str = PROMPTS[0]
    least_k: int | None = 0

    @property
    def rho(self) -> float:
        """Share of the eligible layers that drop."""
        return len(self.sites.layers) / max(len(eligible_layers(self.num_layers)), 1)

    @property
    def active(self) -> bool:
        """True if any layer ever drops; otherwise the stock model is served."""
        return self.k > 0 and bool(self.sites.parts)

    @property
    def kv_skips(self) -> bool:
        """True if LoRA steps leave holes in the drop layers' KV."""
        return self.kv == "skip"

    @property
    def sites(self) -> AdapterSites:
        """The sites and their tensors."""
        return AdapterSites.of(
            self.drop_layers,
            self.injection,
            self.reuse,
            self.hidden_size,
            self.rank,
            self.drop_attention,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON for the engine's config, so that its hash covers everything we compile in."""
        return asdict(self) | {key: list(getattr(self, key)) for key in DropLists._fields}

    @classmethod
    def from_dict(cls, resolved: Mapping[str, Any]) -> LoRADropConfig:
        """Inverse of `as_dict`, for the engine's other processes."""
        return cls(**{**resolved, **{key: tuple(resolved[key]) for key in DropLists._fields}})


def _layer_numbers(value: list[Any]) -> bool:
    numbers = all(type(layer) is int and abs(layer) <= MAX_LAYERS for layer in value)
    return numbers and len(set(value)) == len(value)


@dataclass(frozen=True, slots=True)
class _Setting:
    """One key of `lora_drop`.

    Attributes:
        allowed: its values
        untrained: default under `untrained`; None: there is none
        of_adapter: whether the adapter alone decides it, if there is one
    """

    allowed: Allowed
    untrained: Any = None
    of_adapter: bool = False


def _is_floor(value: Any) -> bool:
    return isinstance(value, Mapping) and [*value] == ["min"] and value["min"] in ALLOWED["k"]


_LAYERS = Allowed(list, "a list of layer numbers, each once", _layer_numbers)
_SETTINGS = {
    "adapter": _Setting(Allowed(str, "a folder, or org/name on the Hugging Face Hub", bool)),
    "untrained": _Setting(Allowed(bool, "true or false", lambda value: True)),
    "k": _Setting(ALLOWED["k"], untrained=3),
    "rho": _Setting(ALLOWED["rho"], untrained=0.5),
    "layers": _Setting(Allowed.one_of(CHOICES)),
    "drop_layers": _Setting(_LAYERS),
    "drop_attention": _Setting(_LAYERS),
    "reuse": _Setting(ALLOWED["reuse"], untrained="update"),
    "kv": _Setting(ALLOWED["kv"], untrained="skip"),
    "injection": _Setting(ALLOWED["injection"], untrained="block", of_adapter=True),
    "r": _Setting(
        Allowed(int, "a rank of at least 1", lambda r: r >= 1), untrained=16, of_adapter=True
    ),
    "prompts": _Setting(Allowed.one_of(PROMPTS)),
    "request_k": _Setting(
        Allowed(
            object,
            'true or false (whether a request may lower its own k by lora_drop_k), or {"min": N}, '
            "the lowest k that it may bring",
            lambda value: isinstance(value, bool) or _is_floor(value),
        )
    ),
}


def resolve(settings: Any, model: BaseModel) -> LoRADropConfig:
    """Checks the user's settings against a model and fills in what they leave open.

    Args:
        settings: the value of `lora_drop`
        model: the model to serve

    Raises:
        LoRADropConfigError: a setting cannot be served as written.
        AdapterError: the adapter itself is at fault.
    """
    if not isinstance(settings, Mapping):
        raise LoRADropConfigError(f"lora_drop={shown(settings)}: expected an object; {HELP}.")
    if unknown := sorted(str(key) for key in settings if key not in _SETTINGS):
        raise LoRADropConfigError(
            f"lora_drop.{unknown[0][:200]}: unknown setting; allowed: {', '.join(_SETTINGS)}."
        )
    for key, value in settings.items():
        allowed = _SETTINGS[key].allowed
        if value not in allowed:
            raise LoRADropConfigError(f"lora_drop.{key}={shown(value)}: expected {allowed.text}.")
    if settings.get("untrained", False):
        if "adapter" in settings:
            raise LoRADropConfigError(
                "lora_drop.untrained=true: cannot be combined with an adapter; drop one of them."
            )
        defaults = {key: setting.untrained for key, setting in _SETTINGS.items()}
        return _resolve_untrained({**defaults, **settings}, settings, model)
    if "adapter" not in settings:
        raise LoRADropConfigError(f"lora_drop.adapter: missing; {HELP}.")
    return _resolve_adapter(settings, model)


def _resolve_untrained(
    merged: Mapping[str, Any], settings: Mapping[str, Any], model: BaseModel
) -> LoRADropConfig:
    if merged["r"] > model.hidden_size:
        raise LoRADropConfigError(
            f"lora_drop.r={shown(merged['r'])}: expected at most the model's width, "
            f"{model.hidden_size}."
        )
    return LoRADropConfig(
        adapter=None,
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        **_layers(settings, model, None, merged["rho"]),
        k=merged["k"],
        reuse=merged["reuse"],
        kv=merged["kv"],
        injection=merged["injection"],
        rank=merged["r"],
        scale=1.0,
        **_for_requests(settings, merged["k"]),
    )


def _resolve_adapter(settings: Mapping[str, Any], model: BaseModel) -> LoRADropConfig:
    for key, setting in _SETTINGS.items():
        if setting.of_adapter and key in settings:
            raise LoRADropConfigError(
                f"lora_drop.{key}={shown(settings[key])}: the adapter decides it; leave it out."
            )
    folder = adapter_folder(settings["adapter"])
    adapter = read_config(folder)
    if adapter.base_model != model:
        raise LoRADropConfigError(
            f"lora_drop.adapter={str(folder)!r}: made for another model ({adapter.base_model}); "
            f"this model is {model}. Use an adapter made for it."
        )
    load_tensors(folder, adapter)
    reuse = settings.get("reuse", adapter.reuse)
    if REUSE[reuse].difference and not REUSE[adapter.reuse].difference:
        raise LoRADropConfigError(
            f"lora_drop.reuse={reuse!r}: needs gates, which this adapter (reuse "
            f"{adapter.reuse!r}) lacks; use another rule or an adapter trained with {reuse!r}."
        )
    own = DropLists(adapter.drop_layers, adapter.drop_attention)
    k = settings.get("k", adapter.k)
    return LoRADropConfig(
        adapter=str(folder.resolve()),
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        **_layers(settings, model, own, None),
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


def _layers(
    settings: Mapping[str, Any], model: BaseModel, adapter: DropLists | None, rho: float | None
) -> dict[str, Any]:
    """D as the fields of the config."""
    try:
        chosen = select(settings, model.num_hidden_layers, adapter, rho)
    except ValueError as error:
        raise LoRADropConfigError(str(error)) from error
    return {key: tuple(layers) for key, layers in chosen._asdict().items()}
