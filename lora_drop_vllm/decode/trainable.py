"""An adapter as a module, and its tensors as the sites that a drop layer's update reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lora_drop_vllm.method.adapter import AdapterConfig, check_tensors, tensor_prefix
from lora_drop_vllm.method.reuse import SITES


class Site(NamedTuple):
    """One injection point of a drop layer: [r, d], [d, r], and [d] where the rule has a gate."""

    A: Tensor
    B: Tensor
    gate: Tensor | None


_NAMES = ("lora_A.weight", "lora_B.weight", "gate")  # of a site's fields, in an adapter folder


def sites(config: AdapterConfig, layer: int, tensors: Mapping[str, Tensor]) -> list[Site]:
    """The sites of a drop layer in the order they run, out of an adapter's tensors."""
    prefixes = [tensor_prefix(layer, site) for site in SITES[config.injection]]
    A, B, gate = _NAMES
    return [
        Site(tensors[f"{p}.{A}"], tensors[f"{p}.{B}"], tensors.get(f"{p}.{gate}")) for p in prefixes
    ]


def named(config: AdapterConfig, layer: int, of: Sequence[Site]) -> dict[str, Tensor]:
    """Inverse of `sites`."""
    return {
        f"{tensor_prefix(layer, site)}.{name}": value
        for site, values in zip(SITES[config.injection], of)
        for name, value in zip(_NAMES, values)
        if value is not None
    }


class Adapter(nn.Module):
    """The tensors of an adapter folder as trainable parameters in fp32.

    Raises:
        AdapterError: the tensors are not those that the config describes.
    """

    def __init__(self, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_tensors("adapter", config, tensors)
        self.config = config
        self._parameters_by_name = nn.ParameterDict(
            {
                name.replace(".", "/"): value.detach().float().clone()
                for name, value in tensors.items()
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """The parameters themselves, by their names in an adapter folder."""
        return {name.replace("/", "."): value for name, value in self._parameters_by_name.items()}
