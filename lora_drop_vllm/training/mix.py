"""A mix of layers that drop whole and layers that drop only their attention.

From nothing dropped, each step takes what costs least KL per saved byte of KV, or per saved time:
one more attention, one more whole layer, or the rest of a layer whose attention drops already. The
KL of the mix is taken as the sum of those of its layers, each dropped alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.method.cost import LayerReads, kv_saving, layers_only_speed
from lora_drop_vllm.method.layers import eligible_layers
from lora_drop_vllm.method.sites import AdapterSites
from lora_drop_vllm.training.settings import Settings

KL = Sequence[float | None]  # by layer, None for always-on layers
ROUNDING = 1e-9


@dataclass(frozen=True)
class Mix:
    """A proposed choice of layers, with what it saves.

    Attributes:
        drop_layers, drop_attention: as in an adapter
        kl: sum of the KL of each of its layers dropped alone, in nats
        kv_saved: share of the KV of generated tokens that is never written
        ideal_speed: S_ideal if only the layers cost time, in proportion to what they read
    """

    drop_layers: list[int]
    drop_attention: list[int]
    kl: float
    kv_saved: float
    ideal_speed: float

    def __str__(self) -> str:
        flags = zip(("--layers", "--drop-attention"), (self.drop_layers, self.drop_attention))
        given = [f"{name} {','.join(map(str, layers))}" for name, layers in flags if layers]
        return (
            f"mix: {' '.join(given)} saves {self.kv_saved:.1%} of the KV, at best "
            f"{self.ideal_speed:.2f}x; KL {self.kl:.3f} if those of its layers add up"
        )


@dataclass(frozen=True)
class Wanted:
    """What a mix is to save: a share of the KV, or time.

    Attributes:
        flag: `save-kv` or `speed`
        value: the share of the KV of generated tokens, or S_ideal
        context: tokens whose keys and values a step reads
        settings: k, and what drops of a whole layer
    """

    flag: str
    value: float
    context: int
    settings: Settings

    @classmethod
    def of(
        cls,
        save_kv: float | None,
        speed: float | None,
        context: int,
        settings: Settings,
        criterion: str,
        model_config: Any,
    ) -> Wanted | None:
        """The wish of the flags of `lora-drop profile`; None without one.

        Raises:
            ValueError: the flags contradict each other, or no mix could save that much.
        """
        if save_kv is None and speed is None:
            if context:
                raise ValueError(f"--context {context}: expected --speed beside it; leave it out")
            return None
        if save_kv is not None and speed is not None:
            raise ValueError(f"--speed {speed}: expected no --save-kv beside it; leave one out")
        flag, value = ("speed", speed) if save_kv is None else ("save-kv", save_kv)
        assert value is not None
        given = f"--{flag} {value}: expected"
        if criterion != "kl":
            raise ValueError(f"{given} --criterion kl beside it; add it")
        if settings.injection == "attn":
            raise ValueError(f"{given} --injection block or attn_mlp: the attention is one choice")
        if flag == "save-kv" and settings.kv != "skip":
            raise ValueError(f"{given} --kv skip: --kv {settings.kv} saves none")
        wanted = cls(flag, value, context, settings)
        wanted._check(model_config)
        return wanted

    def _check(self, model_config: Any) -> None:
        num_layers = model_config.num_hidden_layers
        every = dict.fromkeys(eligible_layers(num_layers), False)
        most, least = self._saved(model_config, every), self._saved(model_config, {})
        if not least < self.value <= most + ROUNDING:
            raise ValueError(
                f"--{self.flag} {self.value}: expected more than {least:g}, at most {most:.3f}: "
                f"with k={self.settings.k}, {len(every)} of {num_layers} layers may drop"
            )

    def propose(self, model_config: Any, kl: KL | None, attention_kl: KL | None) -> Mix:
        """The mix for measured KL of whole layers and of attentions, each dropped alone."""
        assert kl is not None and attention_kl is not None
        share = LayerReads.of(model_config).share(self.context)
        chosen: dict[int, bool] = {}  # layer to whether only its attention drops
        while self._saved(model_config, chosen) < self.value - ROUNDING:
            steps = [
                (cost / saved, layer, only)
                for layer, only, cost, time in _steps(chosen, kl, attention_kl, share)
                if (saved := time if self.flag == "speed" else float(layer not in chosen))
            ]
            _, layer, only = min(steps)
            chosen[layer] = only
        sites = _sites(chosen)
        total = sum((attention_kl if only else kl)[i] or 0.0 for i, only in chosen.items())
        num_layers, k = model_config.num_hidden_layers, self.settings.k
        return Mix(
            drop_layers=sites.whole,
            drop_attention=sites.attention_only,
            kl=total,
            kv_saved=kv_saving(num_layers, len(chosen), k) if self.settings.kv == "skip" else 0.0,
            ideal_speed=_speed(model_config, sites, k, self.context),
        )

    def _saved(self, model_config: Any, chosen: dict[int, bool]) -> float:
        k = self.settings.k
        if self.flag == "save-kv":
            return kv_saving(model_config.num_hidden_layers, len(chosen), k)
        return _speed(model_config, _sites(chosen), k, self.context)


def _steps(
    chosen: dict[int, bool], kl: KL, attention_kl: KL, share: float
) -> Iterator[tuple[int, bool, float, float]]:
    """Layer, whether only its attention drops then, further KL, and further share of its time."""
    for layer, (whole, attention) in enumerate(zip(kl, attention_kl, strict=True)):
        if whole is None or attention is None:
            continue
        if layer not in chosen:
            yield layer, True, attention, share
            yield layer, False, whole, 1.0
        elif chosen[layer]:
            yield layer, False, whole - attention, 1.0 - share


def _sites(chosen: dict[int, bool]) -> AdapterSites:
    whole, attention = ([i for i in chosen if chosen[i] is only] for only in (False, True))
    return AdapterSites.of(whole, "block", "none", 1, 1, attention)


def _speed(model_config: Any, sites: AdapterSites, k: int, context: int) -> float:
    n = model_config.num_hidden_layers
    return layers_only_speed(n, sites, k, LayerReads.of(model_config), context)
