"""The settings of a new adapter, which `fit` and `train` share, checked against a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.method.allowed import ALLOWED
from lora_drop_vllm.method.layers import (
    CHOICES,
    choose_layers,
    eligible_layers,
    num_drop_layers,
)
from lora_drop_vllm.method.selection import DropLists

Require = Callable[[bool, str, object, str], None]  # ok, flag, value, what is allowed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CRITERIA = ("similarity", "kl")  # named choices that need scores of the layers
RHO = 0.25  # default share of the eligible layers that drop


@dataclass(frozen=True)
class Settings:
    """The settings of a new adapter, and how much of a corpus to read for it.

    Attributes:
        rho: share of the eligible layers that drop; None means 0.25, or that `layers` has numbers
        layers: `contiguous`, `uniform`, `similarity` or `kl`, or the numbers of the drop layers
        k: LoRA steps between two full steps
        rank: r of A [r, d] and B [d, r]
        reuse: the value that a drop layer reuses: `previous`, `anchor`, `update` or `none`
        kv: the KV of the drop layers in a LoRA step: `skip` or `write`
        injection: `block` (one correction per layer), `attn_mlp` (one for each of its halves) or
            `attn` (one for its attention; the MLP still runs)
        drop_attention: numbers of further layers of which only the attention drops; without numbers
            in `layers`, no layer drops whole
        length: tokens in a row of the corpus
        tokens: tokens of the corpus to read, at most
        seed: decides the order of the text, the prompts and the phases
        dtype: dtype of the adapter's file: `float32`, `bfloat16` or `float16`
    """

    rho: float | None = None
    layers: str | tuple[int, ...] = CHOICES[0]
    k: int = 3
    rank: int = 16
    reuse: str = "update"
    kv: str = "skip"
    injection: str = "block"
    drop_attention: tuple[int, ...] = ()
    length: int = 256
    tokens: int = 32768
    seed: int = 0
    dtype: str = "float32"

    @property
    def numbers(self) -> DropLists | None:
        """The drop layers by number; None if they are chosen by name and share."""
        attention = tuple(sorted(set(self.drop_attention)))
        if isinstance(self.layers, tuple):
            return DropLists(tuple(sorted(set(self.layers))), attention)
        return DropLists((), attention) if attention and self.layers == CHOICES[0] else None

    def check(self, base: BaseModel) -> None:
        """Raises ValueError if a setting does not fit the model; the error names the flag."""

        def require(ok: bool, flag: str, value: object, allowed: str) -> None:
            if not ok:
                raise ValueError(f"--{flag} {value}: expected {allowed}")

        for flag, allowed in ALLOWED.items():
            value = getattr(self, flag)
            require(value is None or value in allowed, flag, value, allowed.text)
        if self.numbers is None:
            self._check_choice(base, require)
        else:
            require(self.rho is None, "rho", self.rho, "nothing: the layers are given by number")
            _check_numbers(self.numbers, base, require)
        require(self.k >= 1, "k", self.k, "1 or more: without LoRA steps nothing is dropped")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        d = base.hidden_size
        require(1 <= self.rank <= d, "rank", self.rank, f"1 to {d}, the model's width")
        require(
            self.tokens >= self.length, "tokens", self.tokens, f"--length {self.length} or more"
        )

    def _check_choice(self, base: BaseModel, require: Require) -> None:
        names = (*CHOICES, *CRITERIA)
        require(self.layers in names, "layers", self.layers, f"{', '.join(names)} or 3,5,9")
        require(
            not self.drop_attention,
            "drop-attention",
            _listed(self.drop_attention),
            f"numbers for --layers too, not {self.layers}, or no --layers",
        )
        rho = RHO if self.rho is None else self.rho
        eligible = eligible_layers(base.num_hidden_layers)
        require(
            num_drop_layers(rho, base.num_hidden_layers) >= 1,
            "rho",
            rho,
            f"{0.5 / max(len(eligible), 1):.3f} or more: none of {len(eligible)} eligible layers "
            "would drop",
        )

    def check_agrees(self, adapter: AdapterConfig, folder: str) -> None:
        """Raises ValueError if a flag contradicts the adapter that training starts from."""
        plain, theirs = Settings(), {"rank": adapter.r, "rho": adapter.rho}
        theirs |= {"layers": tuple(adapter.drop_layers)}
        theirs |= {"drop_attention": tuple(adapter.drop_attention)}
        for name in ("layers", "drop_attention", "rank", *ALLOWED):
            asked, has = getattr(self, name), theirs.get(name, getattr(adapter, name, None))
            flag = name.replace("_", "-")
            if asked not in (getattr(plain, name), has):
                raise ValueError(
                    f"--{flag} {asked}: the adapter that --from {folder} names has {has}; leave "
                    f"--{flag} out"
                )

    def config(
        self, name: str, base: BaseModel, chosen: Sequence[int] | None = None
    ) -> AdapterConfig:
        """The config of the new adapter for a model called `name`.

        Args:
            chosen: the drop layers that a profile chose; the criteria need them

        Raises:
            ValueError: see `check`.
        """
        self.check(base)
        eligible = eligible_layers(base.num_hidden_layers)
        if self.numbers is None:
            assert isinstance(self.layers, str)
            rho = RHO if self.rho is None else self.rho
            count = num_drop_layers(rho, base.num_hidden_layers)
            lists = DropLists(chosen or choose_layers(self.layers, count, eligible))
        else:
            lists = self.numbers
            rho = sum(map(len, lists)) / len(eligible)
        return AdapterConfig(
            base_model_name_or_path=name,
            base_model=base,
            r=self.rank,
            lora_alpha=float(self.rank),
            rho=rho,
            k=self.k,
            drop_layers=list(lists.drop_layers),
            reuse=self.reuse,
            kv=self.kv,
            injection=self.injection,
            drop_attention=list(lists.drop_attention),
        )


def _check_numbers(lists: DropLists, base: BaseModel, require: Require) -> None:
    eligible = eligible_layers(base.num_hidden_layers)
    for flag, layers in zip(("layers", "drop-attention"), lists):
        require(
            set(layers) <= set(eligible) and any(lists),
            flag,
            _listed(layers),
            f"layers of {eligible}; of {base.num_hidden_layers} the first 3 and the last 1 "
            "always run",
        )
    require(
        not set(lists.drop_layers) & set(lists.drop_attention),
        "drop-attention",
        _listed(lists.drop_attention),
        f"none of --layers {_listed(lists.drop_layers)}",
    )


def _listed(layers: Iterable[object]) -> str:
    return ",".join(map(str, layers))
