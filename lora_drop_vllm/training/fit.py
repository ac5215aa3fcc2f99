"""`lora-drop fit`: an adapter in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_drop_vllm.atomic_files import check_folder
from lora_drop_vllm.decode.decoder import base_model
from lora_drop_vllm.decode.pretrained import model_name, open_model
from lora_drop_vllm.method.adapter import AdapterConfig, save_adapter
from lora_drop_vllm.model_card import write_card
from lora_drop_vllm.training.corpus import read_corpus, remark
from lora_drop_vllm.training.layer_profile import read_profile
from lora_drop_vllm.training.layerwise import fit_tensors
from lora_drop_vllm.training.profiler import measure
from lora_drop_vllm.training.samples import Sample, sample
from lora_drop_vllm.training.settings import CRITERIA, DTYPES, Settings


@dataclass(frozen=True)
class FitResult:
    """An adapter that `fit` made.

    Attributes:
        folder: the adapter's folder
        config: contents of its `adapter_config.json`
        tokens: number of corpus tokens that it was fitted to
        skipped: number of lines, rows or replies of the corpus that could not be used
    """

    folder: Path
    config: AdapterConfig
    tokens: int
    skipped: int

    def __str__(self) -> str:
        made = f"{self.folder}: {self.config.dropped}, rank {self.config.r}"
        return f"{made}, from {self.tokens} tokens{remark(self.skipped)}"


def fit(
    model: str | Path,
    corpus: Sequence[str | Path],
    settings: Settings,
    out: str | Path,
    profile: str | Path | None = None,
) -> FitResult:
    """Fits an adapter in closed form, layer by layer, and saves it.

    Args:
        model: folder, or a name in the local Hugging Face cache
        corpus: files (text or JSON lines, also gzipped), `datasets:NAME[:CONFIG[:SPLIT]]`, or
            `self` for what the model itself writes; with shares of the tokens, as in `self:0.7`
        settings: which layers drop, k, rank, and how many tokens of the corpus to read
        out: folder of the adapter; made if it is not there
        profile: a `profile.json` that scores the layers; without one they are scored on the
            corpus if `settings.layers` needs it

    Raises:
        ValueError: settings, a model, a corpus or a profile that cannot be used.
        RuntimeError: the adapter could not be written.
    """
    model, out = str(model), Path(out)
    check_folder("--out", out)
    texts = read_corpus(corpus, model)
    base, tokenizer = open_model(model)
    settings.check(base_model(base))
    texts = texts.rendered(tokenizer, settings.length)
    samples = sample(base, tokenizer, texts, settings)
    config = new_config(model, base, settings, samples, profile)
    save_adapter(out, config, fit_tensors(base, samples, config), DTYPES[settings.dtype])
    used = sum(s.count for s in samples)
    write_card(out, config, f"Made by `lora-drop fit` from {used} tokens.")
    return FitResult(out, config, used, texts.skipped)


def new_config(
    model: str,
    base: Any,
    settings: Settings,
    samples: Sequence[Sample],
    profile: str | Path | None,
) -> AdapterConfig:
    """The config of a new adapter; the profile chooses its layers if `settings.layers` needs one.

    Raises:
        ValueError: the settings or the profile cannot be used.
    """
    of, name, layers = base_model(base), model_name(model), settings.layers
    if profile is None and layers not in CRITERIA:
        return settings.config(name, of)
    if settings.numbers is not None or layers not in (*CRITERIA, "contiguous"):
        named = layers if settings.numbers is None else "by number"
        raise ValueError(
            f"--profile {profile}: --layers {named} does not use it; leave it out, or choose by "
            f"contiguous or {' or '.join(CRITERIA)}"
        )
    plain = replace(settings, layers="contiguous").config(name, of)
    found = (
        read_profile(Path(profile), of)
        if profile
        else measure(base, samples, config=plain if layers == "kl" else None)
    )
    return settings.config(
        name, of, found.choose(layers, len(plain.drop_layers), settings.injection)
    )
