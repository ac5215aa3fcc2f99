"""The drop layers that a server's settings select: by number, or by share and name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_drop_vllm.method.layers import (
    CHOICES,
    choose_layers,
    eligible_layers,
    num_drop_layers,
)


class DropLists(NamedTuple):
    """D by what drops of a layer, under the names of the settings; each list ascends."""

    drop_layers: Sequence[int]
    drop_attention: Sequence[int] = ()


NAMED = {
    "drop_layers": "the adapter's drop layers",
    "drop_attention": "the layers of which the adapter drops the attention",
}


def select(
    settings: Mapping[str, Any], num_layers: int, adapter: DropLists | None, rho: float | None
) -> DropLists:
    """The layers that drop.

    Args:
        settings: those of `lora_drop`
        adapter: the adapter's layers, of which settings may select some; None without an adapter
        rho: share of the eligible layers that drops if the settings name none; None: the adapter's

    Raises:
        ValueError: the settings name layers that cannot drop, or contradict each other.
    """
    if given := [key for key in DropLists._fields if key in settings]:
        if "rho" in settings or "layers" in settings:
            raise ValueError(
                f"lora_drop.{given[0]}: cannot be combined with lora_drop.rho or lora_drop.layers; "
                "leave them out."
            )
        return _by_number(settings, num_layers, adapter)
    rho = settings.get("rho", rho)
    if rho is None:
        if "layers" in settings:
            raise ValueError(
                f"lora_drop.layers={settings['layers']!r}: needs lora_drop.rho too; add it."
            )
        assert adapter is not None
        return adapter
    every = adapter or DropLists(eligible_layers(num_layers))
    candidates, count = sorted([*every[0], *every[1]]), num_drop_layers(rho, num_layers)
    if count > len(candidates):
        named = "eligible layers" if adapter is None else NAMED["drop_layers"]
        raise ValueError(
            f"lora_drop.rho={rho}: would drop {count} layers, but there are only "
            f"{len(candidates)} of {named}; lower rho."
        )
    chosen = choose_layers(settings.get("layers", CHOICES[0]), count, candidates)
    return DropLists(*([i for i in chosen if i in own] for own in every))


def _by_number(
    settings: Mapping[str, Any], num_layers: int, adapter: DropLists | None
) -> DropLists:
    eligible = eligible_layers(num_layers)
    found = DropLists([]) if adapter is None else adapter
    for key, own in (adapter or DropLists(eligible, eligible))._asdict().items():
        if key not in settings:
            continue
        layers = sorted(settings[key])
        for layer in layers:
            if layer not in eligible:
                raise ValueError(
                    f"lora_drop.{key}={layers}: layer {layer} cannot drop; of {num_layers} layers "
                    f"the first 3 and the last 1 always run; expected a subset of {eligible}."
                )
            if layer not in own:
                raise ValueError(
                    f"lora_drop.{key}={layers}: layer {layer} is not one of {NAMED[key]}; "
                    f"expected a subset of {list(own)}."
                )
        found = found._replace(**{key: layers})
    if both := sorted(set(found.drop_layers) & set(found.drop_attention)):
        raise ValueError(
            f"lora_drop.drop_attention={list(found.drop_attention)}: layers {both} are in "
            "lora_drop.drop_layers too; a layer drops whole or its attention only."
        )
    return found
