"""`lora-drop profile`: measures which layers a model can do without (Sec. IV-B, IV-C).

Similarity is sim(l, distance) of Eq. 17 over the base model's stream, batch by batch. For KL,
single layers and runs of layers drop with an update fitted for them. `layer_runs.py` then compares
the model's distributions with the base model's.
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

from lora_drop_vllm.atomic_files import check_folder, replacing
from lora_drop_vllm.decode.decoder import base_model, run_layer
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.method.adapter import AdapterConfig
from lora_drop_vllm.method.layers import num_drop_layers
from lora_drop_vllm.plots import plot_distances, plot_layers, plot_runs, require_matplotlib
from lora_drop_vllm.training.corpus import read_corpus
from lora_drop_vllm.training.layer_profile import HORIZON, Profile
from lora_drop_vllm.training.layer_runs import measure_runs
from lora_drop_vllm.training.mix import Mix, Wanted
from lora_drop_vllm.training.samples import Sample, sample
from lora_drop_vllm.training.settings import CRITERIA, Settings

DISTANCES = (1, 2, 3, 5, 10)  # of Fig. 4
RHOS = (0.25, 0.5, 0.75)
TOKENS = 16384  # tokens of the corpus, unless --tokens is given


def profile(
    model: str | Path,
    corpus: Sequence[str | Path],
    settings: Settings,
    out: str | Path,
    *,
    criterion: str = CRITERIA[0],
    distances: Sequence[int] = DISTANCES,
    rhos: Sequence[float] = RHOS,
    save_kv: float | None = None,
    speed: float | None = None,
    context: int = 0,
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
        save_kv, speed, context: propose a mix of whole layers and attentions that saves that share
            of the KV, or has that ideal speed at that context (see `Wanted`)
        plots: draw the figures too (needs matplotlib)

    Raises:
        ValueError: settings, a model or a corpus that cannot be used.
    """
    model, out = str(model), Path(out)
    _check(criterion, rhos, plots, out)
    texts = read_corpus(corpus, model)
    base, tokenizer = open_model(model)
    settings.check(base_model(base))
    wanted = Wanted.of(save_kv, speed, context, settings, criterion, base.config)
    texts = texts.rendered(tokenizer, settings.length)
    found = measure(
        base,
        sample(base, tokenizer, texts, settings),
        distances,
        settings.config(model, base_model(base)) if criterion == "kl" else None,
        rhos,
        attention=wanted is not None,
    )
    mix = None if wanted is None else wanted.propose(base.config, found.kl, found.attention_kl)
    result = ProfileResult(out / "profile.json", found, found.drop_layers(rhos), mix)
    return _saved(result, rhos, plots)


def _saved(result: ProfileResult, rhos: Sequence[float], plots: bool) -> ProfileResult:
    mix = None if result.mix is None else asdict(result.mix)
    report = result.profile.report(rhos) | {"mix": mix}
    result.path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(result.path) as scratch:
        scratch.write_text(json.dumps(report, indent=2) + "\n")
    if plots:
        draw(result.profile, result.path.parent)
    return result


def _check(criterion: str, rhos: Sequence[float], plots: bool, out: Path) -> None:
    check_folder("--out", out)
    if plots:
        require_matplotlib()
    if criterion not in CRITERIA:
        raise ValueError(f"--criterion {criterion}: expected one of {', '.join(CRITERIA)}")
    for rho in rhos:
        if not 0 < rho <= 1:
            raise ValueError(
                f"--rho {rho}: expected more than 0, up to 1; write 0.25 for a quarter"
            )


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
        mix: the proposed mix of whole layers and attentions, if one was wanted
    """

    path: Path
    profile: Profile
    drop_layers: dict[float, dict[str, list[int]]]
    mix: Mix | None = None

    def __str__(self) -> str:
        found = self.profile
        lines = [
            f"{self.path}: {found.tokens} tokens, similarity horizon "
            f"{found.horizon(found.mean_curve())} of {found.distances}"
        ]
        for rho, choices in self.drop_layers.items():
            lines += [f"rho {rho}, {choice}: {layers}" for choice, layers in choices.items()]
        return "\n".join([*lines, *([] if self.mix is None else [str(self.mix)])])


@torch.no_grad()
def measure(
    model: Any,
    samples: Sequence[Sample],
    distances: Sequence[int] = DISTANCES,
    config: AdapterConfig | None = None,
    rhos: Sequence[float] = (),
    attention: bool = False,
) -> Profile:
    """The profile of a model; a config adds KL, with updates like those that it describes.

    Args:
        rhos: shares that set the lengths of the runs
        attention: also drop the attention of each layer alone

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
    runs = attentions = None
    if config is not None:
        counts = {num_drop_layers(rho, base.num_hidden_layers) for rho in rhos} - {0}
        runs = measure_runs(model, samples, config, counts)
        if attention:
            attentions = measure_runs(model, samples, replace(config, injection="attn"), ())
    tokens = sum(part.count for part in samples)
    return Profile(base, tokens, list(distances), (sums / pairs).tolist(), runs, attentions)


def _pairs(sequence: Tensor, distance: int) -> Tensor:
    """[N, T - distance] bool: true if the token that far ahead belongs to the same sequence."""
    first, second = sequence[:, :-distance], sequence[:, distance:]
    return (first == second) & (first >= 0)
