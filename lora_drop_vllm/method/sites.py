"""Sites, the parts of a drop layer with an adapter of their own, and the tensors of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_drop_vllm.method.reuse import REUSE, SITES, SPANS


class Site(NamedTuple):
    """The tensors of one site: A [r, d], B [d, r], and gate [d] if the rule has gates."""

    A: Tensor
    B: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SiteTensor:
    """A field of `Site` as an adapter folder holds it.

    Attributes:
        name: in the folder, after the prefix of the site
        axes: "d" and "r" in their order
        start: all its values before training; None: normal, with variance 1/d
    """

    name: str
    axes: str
    start: float | None


TENSORS = {
    "A": SiteTensor("lora_A.weight", "rd", None),
    "B": SiteTensor("lora_B.weight", "dr", 0.0),
    "gate": SiteTensor("gate", "d", 1.0),
}


def mlp_runs(parts: Iterable[str]) -> bool:
    """True if the MLP of a layer with these sites runs in LoRA steps, too."""
    return max(SPANS[part][1] for part in parts) < max(SPANS[""])


@dataclass(frozen=True)
class AdapterSites:
    """All sites of an adapter: names and shapes of its tensors, and what they start at.

    Attributes:
        parts: the sites of each drop layer in the order that they run; "" is the whole layer.
            The layers ascend.
        hidden_size, rank: d and r
        gated: whether the sites have gates
    """

    parts: Mapping[int, tuple[str, ...]]
    hidden_size: int
    rank: int
    gated: bool

    @classmethod
    def of(
        cls,
        drop_layers: Iterable[int],
        injection: str,
        reuse: str,
        hidden_size: int,
        rank: int,
        drop_attention: Iterable[int] = (),
    ) -> AdapterSites:
        """The sites that an adapter or a server with these settings has."""
        parts = dict.fromkeys(drop_layers, SITES[injection])
        parts |= dict.fromkeys(drop_attention, SITES["attn"])
        return cls(dict(sorted(parts.items())), hidden_size, rank, REUSE[reuse].difference)

    @property
    def layers(self) -> list[int]:
        """D: the drop layers, ascending."""
        return list(self.parts)

    @property
    def attention_only(self) -> list[int]:
        """The drop layers whose own MLP runs in LoRA steps, too."""
        return [layer for layer, parts in self.parts.items() if mlp_runs(parts)]

    @property
    def whole(self) -> list[int]:
        """The drop layers of which nothing runs in LoRA steps."""
        return [layer for layer, parts in self.parts.items() if not mlp_runs(parts)]

    @property
    def layer_of_site(self) -> list[int]:
        """The layer of each site, for all sites in the order that they run."""
        return [layer for layer, parts in self.parts.items() for _ in parts]

    def runs(self) -> list[list[int]]:
        """The drop layers, those together that run nothing but their sites one after the other."""
        runs: list[list[int]] = []
        for layer, parts in self.parts.items():
            before = runs[-1][-1] if runs else None
            joins = before == layer - 1 and not mlp_runs(self.parts[before])
            if joins and not mlp_runs(parts):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return runs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of exactly the tensors that belong to the adapter."""
        return {name: self._shape(field) for name, field in self._names()}

    def start(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The tensors before training: B = 0 and g = 1.

        While B is 0, A changes nothing; it is normal with variance 1/d, or 0 without a generator.
        """
        tensors = {}
        for name, field in self._names():
            shape, start = self._shape(field), TENSORS[field].start
            if start is None and generator is not None:
                scale: float = self.hidden_size**0.5
                tensors[name] = torch.randn(shape, generator=generator) / scale
            else:
                tensors[name] = torch.full(shape, start or 0.0)
        return tensors

    def of_layer(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Site]:
        """The sites of one drop layer in the order that they run, from an adapter's tensors."""
        return {
            part: Site(**{field: tensors[name] for name, field in self._names_of(layer, part)})
            for part in self.parts[layer]
        }

    def named(self, layer: int, sites: Mapping[str, Site]) -> dict[str, Tensor]:
        """The tensors of one drop layer by name; the inverse of `of_layer`."""
        return {
            name: getattr(site, field)
            for part, site in sites.items()
            for name, field in self._names_of(layer, part)
        }

    def _names(self) -> Iterator[tuple[str, str]]:
        for layer, parts in self.parts.items():
            for part in parts:
                yield from self._names_of(layer, part)

    def _names_of(self, layer: int, part: str) -> Iterator[tuple[str, str]]:
        """Names of a site's tensors, and the fields of `Site` that they fill."""
        prefix = f"layers.{layer}.{part}" if part else f"layers.{layer}"
        for field, tensor in TENSORS.items():
            if self.gated or field != "gate":
                yield f"{prefix}.{tensor.name}", field

    def _shape(self, field: str) -> tuple[int, ...]:
        sizes = {"d": self.hidden_size, "r": self.rank}
        return tuple(sizes[axis] for axis in TENSORS[field].axes)
