"""`lora-drop profile`: measures which layers a model can do without (Sec. IV-B, IV-C).

Similarity is sim(l, distance) of Eq. 17 over the base model's stream, batch by batch. For KL,
single layers and runs of layers drop with an update fitted for them. `layer_runs.py` then compares
the model's distributions with the base model's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lora_drop_vllm.decode.decoder import base_model, run_layer
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.method.layers import eligible_layers, num_drop_layers, rank_layers
from lora_drop_vllm.plots import plot_distances, plot_layers, plot_runs, require_matplotlib
from lora_drop_vllm.training.corpus import read_corpus
from lora_drop_vllm.training.layer_runs import Run, measure_runs
from lora_drop_vllm.training.samples import Sample, sample
from lora_drop_vllm.training.settings import CRITERIA, Settings

DISTANCES = (1, 2, 3, 5, 10)  # of Fig. 4
RHOS = (0.25, 0.5, 0.75)
TOKENS = 16384  # tokens of the corpus, unless --tokens is given
HORIZON = 0.5  # the least similarity within the similarity horizon, Fig. 1


def profile(
    model: str | Path,
    corpus: Sequence[str | Path],
    settings: Settings,
    out: str | Path,
    *,
    criterion: str = CRITERIA[0],
    distances: Sequence[int] = DISTANCES,
    rhos: Sequence[float] = RHOS,
    plots: bool = False,
) -> ProfileResult:
    """Measures which layers may drop, and writes `profile.json` (and figures) to `out`.

    Args:
        model: folder, or a name in the local Hugging Face cache
        corpus: files (text or JSON lines, also gzipped), `datasets:NAME[:CONFIG[:SPLIT]]`, or
            `self` for what the model itself writes; with shares of the tokens, as in `self:0.7`
        settings: how much of the corpus to read; with `kl` also what is fitted to each layer
        out: folder to write to; made if it is not there
        criterion: `similarity` (Eq. 17), or `kl` to measure both
        distances: token distances of the similarity
        rhos: shares of the eligible layers to choose drop layers for, each above 0, up to 1
        plots: draw the figures too (needs matplotlib)

    Raises:
        ValueError: settings, a model or a corpus that cannot be used.
    """
    model, out = str(model), Path(out)
    if plots:
        require_matplotlib()
    _check(criterion, rhos)
    texts = read_corpus(corpus, model)
    base, tokenizer = open_model(model)
    settings.check(base_model(base))
    texts = texts.rendered(tokenizer, settings.length)
    found = measure(
        base,
        sample(base, tokenizer, texts, settings),
        distances,
        settings.config(model, base_model(base)) if criterion == "kl" else None,
        rhos,
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "profile.json"
    path.write_text(json.dumps(found.report(rhos), indent=2) + "\n")
    if plots:
        draw(found, out)
    return ProfileResult(path, found, found.drop_layers(rhos))


def _check(criterion: str, rhos: Sequence[float]) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"--criterion {criterion}: expected one of {', '.join(CRITERIA)}")
    for rho in rhos:
        if not 0 < rho <= 1:
            raise ValueError(
                f"--rho {rho}: expected more than 0, up to 1; write 0.25 for a quarter"
            )


@dataclass(frozen=True)
class Profile:
    """Measurements of a model's layers; `profile.json` uses the same names.

    Attributes:
        tokens: number of tokens measured
        similarity: [n][distances]  sim(l, distance) of every layer
        runs: measured runs of layers, including single layers; None if KL was not measured
    """

    base_model: BaseModel
    tokens: int
    distances: list[int]
    similarity: list[list[float]]
    runs: list[Run] | None = None

    @property
    def kl(self) -> list[float | None] | None:
        """KL(base || one layer dropped), [n], None for always-on layers; None if not measured."""
        if self.runs is None:
            return None
        alone = {run.first: run.kl for run in self.runs if run.count == 1}
        return [alone.get(i) for i in range(self.base_model.num_hidden_layers)]

    def scores(self, criterion: str) -> list[float]:
        """Scores of all layers; a layer with a higher score drops sooner (Sec. IV-C).

        Raises:
            ValueError: the profile was made without that criterion.
        """
        if criterion == "similarity":
            return [sum(row) / len(row) for row in self.similarity]
        if self.kl is None:
            raise ValueError("--layers kl: the profile has none; make it with --criterion kl")
        return [float("-inf") if value is None else -value for value in self.kl]

    def choose(self, choice: str, count: int) -> list[int]:
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
        scores = self.scores("kl" if choice == "kl" else "similarity")
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
            "scores": self.scores("similarity"),
            "horizon": [self.horizon(row) for row in self.similarity],
            "mean_horizon": self.horizon(self.mean_curve()),
            "drop_layers": lists,
        }


def draw(profile: Profile, folder: Path) -> None:
    """Draws `distances.png` (Fig. 1) and `layers.png` (Fig. 4), and with KL also `runs.png`."""
    curve = dict(zip(profile.distances, profile.mean_curve()))
    horizons = [profile.horizon(row) for row in profile.similarity]
    plot_distances(curve, horizons, HORIZON, folder / "distances.png")
    plot_layers(dict(zip(profile.distances, zip(*profile.similarity))), folder / "layers.png")
    if profile.runs is not None:
        counts = {run.count for run in profile.runs}
        runs = {n: [(run.first, run.kl) for run in profile.runs if run.count == n] for n in counts}
        plot_runs(runs, folder / "runs.png")


@dataclass(frozen=True)
class ProfileResult:
    """The result of `profile`.

    Attributes:
        path: the `profile.json` that it wrote, for `fit` or `train`
        profile: similarity and KL of the layers
        drop_layers: rho to choice (`similarity`, `kl`, `contiguous`) to the drop layers
    """

    path: Path
    profile: Profile
    drop_layers: dict[float, dict[str, list[int]]]

    def __str__(self) -> str:
        found = self.profile
        lines = [
            f"{self.path}: {found.tokens} tokens, similarity horizon "
            f"{found.horizon(found.mean_curve())} of {found.distances}"
        ]
        for rho, choices in self.drop_layers.items():
            lines += [f"rho {rho}, {choice}: {layers}" for choice, layers in choices.items()]
        return "\n".join(lines)


def read_profile(path: Path, base: BaseModel) -> Profile:
    """The profile in a `profile.json`, checked against a model.

    Raises:
        ValueError: the file cannot be read, is no profile, or was made for another model.
    """
    try:
        raw = json.loads(path.read_text())
        model = BaseModel(**raw["base_model"])
        rest = {key: raw[key] for key in ("tokens", "distances", "similarity")}
        runs = None if raw["runs"] is None else [Run(**run) for run in raw["runs"]]
        profile = Profile(model, **rest, runs=runs)
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


@torch.no_grad()
def measure(
    model: Any,
    samples: Sequence[Sample],
    distances: Sequence[int] = DISTANCES,
    config: AdapterConfig | None = None,
    rhos: Sequence[float] = (),
) -> Profile:
    """The profile of a model; a config adds KL, with updates like those that it describes.

    Args:
        rhos: shares that set the lengths of the runs

    Raises:
        ValueError: no two tokens of a sequence are that far apart, or there is too little text.
    """
    sums = torch.zeros(model.config.num_hidden_layers, len(distances), dtype=torch.float64)
    pairs = torch.zeros(len(distances))
    for part in tqdm(samples, desc="Profiling", unit="batch"):
        masks = [_pairs(part.schedule.sequence, distance) for distance in distances]
        pairs += torch.stack([mask.sum() for mask in masks]).cpu()
        x = model.model.embed_tokens(part.tokens)
        for i, layer in enumerate(model.model.layers):
            x = run_layer(layer, x, part.batch)
            unit = normalize(x.float(), dim=-1)
            for j, (distance, mask) in enumerate(zip(distances, masks)):
                cosine = (unit[:, :-distance] * unit[:, distance:]).sum(-1)
                sums[i, j] += float(cosine[mask].sum())
    for distance, count in zip(distances, pairs.tolist()):
        if not count:
            raise ValueError(
                f"--distances {distance}: no two tokens of a document are that far apart in a row; "
                "lower it or raise --length"
            )
    base = base_model(model)
    runs = None
    if config is not None:
        counts = {num_drop_layers(rho, base.num_hidden_layers) for rho in rhos} - {0}
        runs = measure_runs(model, samples, config, counts)
    tokens = sum(part.count for part in samples)
    return Profile(base, tokens, list(distances), (sums / pairs).tolist(), runs)


def _pairs(sequence: Tensor, distance: int) -> Tensor:
    """[N, T - distance] bool: true if the token that far ahead belongs to the same sequence."""
    first, second = sequence[:, :-distance], sequence[:, distance:]
    return (first == second) & (first >= 0)
