"""`lora-drop fit`: an adapter in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_drop_vllm.decode.decoder import base_model
from lora_drop_vllm.decode.pretrained import model_name, open_model
from lora_drop_vllm.method.adapter import AdapterConfig, save_adapter
from lora_drop_vllm.training.corpus import read_corpus
from lora_drop_vllm.training.layerwise import fit_tensors
from lora_drop_vllm.training.profiler import measure, read_profile
from lora_drop_vllm.training.samples import Sample, sample
from lora_drop_vllm.training.settings import CRITERIA, DTYPES, Settings


def fit(
    model: str,
    corpus: Sequence[str | Path],
    settings: Settings,
    out: Path,
    profile: Path | None = None,
) -> str:
    """Fit an adapter, save it in `out` and say what it is.

    Args:
        profile: `profile.json` that scores the layers; measured on the corpus where it is needed

    Raises:
        ValueError: settings, a corpus or a profile that cannot be used.
    """
    texts = read_corpus(corpus)
    base, tokenizer = open_model(model)
    settings.check(base_model(base))
    texts = texts.rendered(tokenizer, settings.length)
    samples = sample(base, tokenizer, texts, settings)
    config = new_config(model, base, settings, samples, profile)
    save_adapter(out, config, fit_tensors(base, samples, config), DTYPES[settings.dtype])
    used = sum(s.count for s in samples)
    made = f"{out}: drop layers {config.drop_layers}, rank {config.r}, from {used} tokens"
    return made + texts.remark()


def new_config(
    model: str, base: Any, settings: Settings, samples: Sequence[Sample], profile: Path | None
) -> AdapterConfig:
    """Config of a new adapter, its layers chosen by the profile where the choice asks for one.

    Raises:
        ValueError: settings or a profile that cannot be used.
    """
    of, name, layers = base_model(base), model_name(model), settings.layers
    if profile is None and layers not in CRITERIA:
        return settings.config(name, of)
    if layers not in (*CRITERIA, "contiguous"):
        raise ValueError(
            f"--profile {profile}: --layers {layers} reads none; leave it out, or choose by "
            f"contiguous or {' or '.join(CRITERIA)}"
        )
    plain = replace(settings, layers="contiguous").config(name, of)
    found = (
        read_profile(profile, of)
        if profile
        else measure(base, samples, config=plain if layers == "kl" else None)
    )
    return settings.config(name, of, found.choose(layers, len(plain.drop_layers)))
