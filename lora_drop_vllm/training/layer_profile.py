"""Measurements of a model's layers, as `profile.json` holds them, and the layers they choose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.method.layers import eligible_layers, num_drop_layers, rank_layers
from lora_drop_vllm.training.layer_runs import Run
from lora_drop_vllm.training.settings import CRITERIA

HORIZON = 0.5  # the least similarity within the similarity horizon, Fig. 1


@dataclass(frozen=True)
class Profile:
    """Measurements of a model's layers; `profile.json` uses the same names.

    Attributes:
        tokens: number of tokens measured
        similarity: [n][distances]  sim(l, distance) of every layer
        runs: measured runs of layers, including single layers; None if KL was not measured
        attention_runs: single layers of which only the attention drops; None if not measured
    """

    base_model: BaseModel
    tokens: int
    distances: list[int]
    similarity: list[list[float]]
    runs: list[Run] | None = None
    attention_runs: list[Run] | None = None

    @property
    def kl(self) -> list[float | None] | None:
        """KL(base || one layer dropped), [n], None for always-on layers; None if not measured."""
        return self._alone(self.runs)

    @property
    def attention_kl(self) -> list[float | None] | None:
        """KL(base || the attention of one layer dropped), in the form of `kl`."""
        return self._alone(self.attention_runs)

    def _alone(self, runs: list[Run] | None) -> list[float | None] | None:
        if runs is None:
            return None
        alone = {run.first: run.kl for run in runs if run.count == 1}
        return [alone.get(i) for i in range(self.base_model.num_hidden_layers)]

    def scores(self, criterion: str, injection: str = "block") -> list[float]:
        """Scores of all layers; a layer with a higher score drops sooner (Sec. IV-C).

        Where the KL of the attentions was measured too, it is that of the injection `attn`.

        Raises:
            ValueError: the profile was made without that criterion.
        """
        if criterion == "similarity":
            return [sum(row) / len(row) for row in self.similarity]
        kl = self.attention_kl if injection == "attn" and self.attention_runs else self.kl
        if kl is None:
            raise ValueError("--layers kl: the profile has none; make it with --criterion kl")
        return [float("-inf") if value is None else -value for value in kl]

    def choose(self, choice: str, count: int, injection: str = "block") -> list[int]:
        """The `count` layers that drop.

        `contiguous` takes the measured run of the lowest KL. Without KL, it takes the run of the
        highest mean similarity. Other choices are criteria and take the layers that score highest.

        Raises:
            ValueError: the profile was made without that criterion, or for other counts.
        """
        if choice == "contiguous" and self.runs is not None:
            if runs := [run for run in self.runs if run.count == count]:
                return min(runs, key=lambda run: run.kl).layers
            raise ValueError(
                f"--layers contiguous: {count} layers are to drop, but the profile has runs of "
                f"{', '.join(map(str, sorted({run.count for run in self.runs})))}; make it with "
                "that --rho, or choose --layers kl"
            )
        scores = self.scores("kl" if choice == "kl" else "similarity", injection)
        eligible = eligible_layers(self.base_model.num_hidden_layers)
        return rank_layers(choice, count, eligible, scores)

    def horizon(self, curve: Sequence[float]) -> int:
        """Largest distance up to which a similarity by distance remains at 0.5 or more (Fig. 1)."""
        within = 0
        for distance, value in sorted(zip(self.distances, curve)):
            if value < HORIZON:
                break
            within = distance
        return within

    def mean_curve(self) -> list[float]:
        """Similarity by distance, the mean over all layers."""
        return [sum(column) / len(column) for column in zip(*self.similarity)]

    def drop_layers(self, rhos: Sequence[float]) -> dict[float, dict[str, list[int]]]:
        """Drop layers for each rho, by each choice that was measured."""
        choices = (*CRITERIA[: 1 if self.runs is None else 2], "contiguous")
        counts = {rho: num_drop_layers(rho, self.base_model.num_hidden_layers) for rho in rhos}
        return {
            rho: {choice: self.choose(choice, count) if count else [] for choice in choices}
            for rho, count in counts.items()
        }

    def report(self, rhos: Sequence[float]) -> dict[str, Any]:
        """The contents of `profile.json`: the profile, scores, horizons and drop layers."""
        lists = {str(rho): chosen for rho, chosen in self.drop_layers(rhos).items()}
        return asdict(self) | {
            "kl": self.kl,
            "attention_kl": self.attention_kl,
            "scores": self.scores("similarity"),
            "horizon": [self.horizon(row) for row in self.similarity],
            "mean_horizon": self.horizon(self.mean_curve()),
            "drop_layers": lists,
        }


def read_profile(path: Path, base: BaseModel) -> Profile:
    """The profile in a `profile.json`, checked against a model.

    Raises:
        ValueError: the file cannot be read, is no profile, or was made for another model.
    """
    try:
        raw = json.loads(path.read_text())
        model = BaseModel(**raw["base_model"])
        rest = {key: raw[key] for key in ("tokens", "distances", "similarity")}
        runs, attention = (
            None if found is None else [Run(**run) for run in found]
            for found in (raw["runs"], raw.get("attention_runs"))
        )
        profile = Profile(model, **rest, runs=runs, attention_runs=attention)
        if len(profile.similarity) != model.num_hidden_layers:
            raise ValueError(f"{len(profile.similarity)} layers")
    except OSError as error:
        raise ValueError(f"--profile {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--profile {path}: not what `lora-drop profile` writes ({error}); name a profile.json"
        ) from error
    if model != base:
        raise ValueError(f"--profile {path}: made for {model}; the model is {base}")
    return profile
