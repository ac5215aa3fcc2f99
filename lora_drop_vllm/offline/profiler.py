"""`lora-drop profile`: which layers a model can do without (Sec. IV-B, IV-C).

Similarity: sim(l, distance) of Eq. 17 over the base model's stream, batch by batch. KL: one layer
at a time drops, with the update fitted for it alone, and the model's distributions at LoRA
positions are held against the base model's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.method.layers import eligible_layers, num_drop_layers, rank_layers
from lora_drop_vllm.offline.closeness import divergence
from lora_drop_vllm.offline.corpus import read_corpus
from lora_drop_vllm.offline.layerwise import fit_layer
from lora_drop_vllm.offline.parallel import base_model, run_layer
from lora_drop_vllm.offline.positions import take
from lora_drop_vllm.offline.pretrained import open_model
from lora_drop_vllm.offline.samples import HELD_OUT, Sample, sample
from lora_drop_vllm.offline.settings import CRITERIA, Settings

DISTANCES = (1, 2, 3, 5, 10)  # of Fig. 4
HORIZON = 0.5  # the least similarity within the similarity horizon, Fig. 1


def profile(
    model: str,
    corpus: Sequence[Path],
    settings: Settings,
    out: Path,
    *,
    criterion: str,
    distances: Sequence[int],
    rhos: Sequence[float],
    plots: bool,
) -> str:
    """Profile a model, write `profile.json` and figures to `out`, and say what was found.

    Raises:
        ValueError: settings or a corpus that cannot be used.
    """
    from lora_drop_vllm.offline.plots import plot_profile, require_matplotlib

    if plots:
        require_matplotlib()
    for rho in rhos:
        if not 0 < rho <= 1:
            raise ValueError(
                f"--rho {rho}: expected more than 0, up to 1; write 0.25 for a quarter"
            )
    texts = read_corpus(corpus)
    base, tokenizer = open_model(model)
    settings.check(base_model(base))
    texts = texts.rendered(tokenizer, settings.length)
    found = measure(
        base,
        sample(base, tokenizer, texts, settings),
        distances,
        settings.config(model, base_model(base)) if criterion == "kl" else None,
    )
    out.mkdir(parents=True, exist_ok=True)
    report = found.report(rhos)
    (out / "profile.json").write_text(json.dumps(report, indent=2) + "\n")
    if plots:
        plot_profile(found, out)
    return _render(out, report)


def _render(out: Path, report: dict[str, Any]) -> str:
    lines = [
        f"{out}/profile.json: {report['tokens']} tokens, similarity horizon "
        f"{report['mean_horizon']} of {report['distances']}"
    ]
    for rho, choices in report["drop_layers"].items():
        lines += [f"rho {rho}, {choice}: {layers}" for choice, layers in choices.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Profile:
    """What a model's layers are like; `profile.json` in its own names.

    Attributes:
        tokens: it was measured on
        similarity: [n][distances]  sim(l, distance) of every layer
        kl: [n]  KL(base || the layer alone dropped), None for layers that never drop; or None
    """

    base_model: BaseModel
    tokens: int
    distances: list[int]
    similarity: list[list[float]]
    kl: list[float | None] | None = None

    def scores(self, criterion: str) -> list[float]:
        """Of every layer; the higher, the sooner it drops (Sec. IV-C).

        Raises:
            ValueError: the profile was made without that criterion.
        """
        if criterion == "similarity":
            return [sum(row) / len(row) for row in self.similarity]
        if self.kl is None:
            raise ValueError("--layers kl: the profile has none; make it with --criterion kl")
        return [float("-inf") if value is None else -value for value in self.kl]

    def horizon(self, curve: Sequence[float]) -> int:
        """Largest distance up to which a similarity by distance remains at 0.5 or more (Fig. 1)."""
        within = 0
        for distance, value in sorted(zip(self.distances, curve)):
            if value < HORIZON:
                break
            within = distance
        return within

    def mean_curve(self) -> list[float]:
        """Similarity by distance, over all layers."""
        return [sum(column) / len(column) for column in zip(*self.similarity)]

    def report(self, rhos: Sequence[float]) -> dict[str, Any]:
        """Everything, with scores, horizons and the drop layers for each rho by each choice."""
        n = self.base_model.num_hidden_layers
        eligible = eligible_layers(n)
        lists: dict[str, dict[str, list[int]]] = {}
        for rho in rhos:
            count = num_drop_layers(rho, n)
            lists[str(rho)] = {
                choice: rank_layers(choice, count, eligible, self.scores(choice))
                for choice in CRITERIA[: 1 if self.kl is None else 2]
            } | {
                "contiguous": rank_layers("contiguous", count, eligible, self.scores("similarity"))
            }
        return asdict(self) | {
            "scores": self.scores("similarity"),
            "horizon": [self.horizon(row) for row in self.similarity],
            "mean_horizon": self.horizon(self.mean_curve()),
            "drop_layers": lists,
        }


def read_profile(path: Path, base: BaseModel) -> Profile:
    """A `profile.json` for a model.

    Raises:
        ValueError: it cannot be read, is none, or was made for another model.
    """
    try:
        raw = json.loads(path.read_text())
        model = BaseModel(**raw["base_model"])
        rest = {key: raw[key] for key in ("tokens", "distances", "similarity", "kl")}
        profile = Profile(model, **rest)
        fits = {len(profile.similarity), len(profile.kl or profile.similarity)}
        if fits != {model.num_hidden_layers}:
            raise ValueError(f"{fits} layers")
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
) -> Profile:
    """The profile of a model; with a config also by KL, for updates like those it describes.

    Raises:
        ValueError: a distance that no two tokens of a sequence have.
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
    return Profile(
        base_model(model),
        sum(part.count for part in samples),
        list(distances),
        (sums / pairs).tolist(),
        None if config is None else _divergences(model, samples, config),
    )


def _pairs(sequence: Tensor, distance: int) -> Tensor:
    """[N, T - distance] bool: the token that far ahead is of the same sequence."""
    first, second = sequence[:, :-distance], sequence[:, distance:]
    return (first == second) & (first >= 0)


def _divergences(
    model: Any, samples: Sequence[Sample], config: AdapterConfig
) -> list[float | None]:
    """KL per layer at the LoRA positions of the held-out batches."""
    layers = model.model.layers
    batches = [part.batch for part in samples]
    held = list(range(len(samples)))[1::HELD_OUT]

    def log_p(streams: list[Tensor], begin: int) -> list[Tensor]:
        found = []
        for n, x in zip(held, streams):
            for layer in layers[begin:]:
                x = run_layer(layer, x, batches[n])
            rows = model.model.norm(take(x, batches[n].layout.lora_at))
            found.append(rows)
        return found

    x = [model.model.embed_tokens(part.tokens) for part in samples]
    base = log_p([x[n] for n in held], 0)
    found: list[float | None] = [None] * len(layers)
    eligible = eligible_layers(len(layers))
    for i, layer in enumerate(tqdm(layers, desc="Dropping", unit="layer")):
        if i not in eligible:
            x = [run_layer(layer, stream, batch) for stream, batch in zip(x, batches)]
            continue
        _, after, dropped = fit_layer(layer, x, x, batches, replace(config, drop_layers=[i]))
        found[i] = _mean_divergence(model, log_p([dropped[n] for n in held], i + 1), base)
        x = after
    return found


def _mean_divergence(model: Any, hidden: list[Tensor], base: list[Tensor]) -> float:
    total = count = 0.0
    for own, other in zip(hidden, base):
        for a, b in zip(own.split(256), other.split(256)):  # the vocabulary is wide
            log_p, base_log_p = (model.lm_head(h).float().log_softmax(-1) for h in (a, b))
            total += float(divergence(log_p, base_log_p).sum())
            count += len(a)
    return total / count
