"""The card of an adapter, README.md, as the Hugging Face Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_drop_vllm.atomic_files import replacing
from lora_drop_vllm.method.adapter import AdapterConfig
from lora_drop_vllm.method.cost import ideal_speed, kv_saving

CARD = "README.md"
FIGURES = "evaluation.json"  # beside the card: what `lora-drop evaluate --json` wrote
OURS = "# written by lora-drop, which keeps a card without this line as it is"


def write_card(
    folder: Path, config: AdapterConfig, made_by: str = "", report: dict[str, Any] | None = None
) -> None:
    """Writes the card of the adapter in a folder, with the figures of its evaluation, if given.

    A card that somebody else wrote stays.

    Args:
        made_by: what made the adapter, one line; empty: what the old card says
        report: what `lora-drop evaluate --json` writes
    """
    card = folder / CARD
    old = card.read_text().splitlines() if card.is_file() else []
    if old and OURS not in old:
        return
    made_by = made_by or next((line for line in old if line.startswith("Made by")), "")
    with replacing(card) as scratch:
        lines = [*_front_matter(config), *_body(config, made_by, report), ""]
        scratch.write_text("\n".join(lines))


def _front_matter(config: AdapterConfig) -> Iterator[str]:
    base = config.base_model_name_or_path
    yield "---"
    yield OURS
    if base.count("/") == 1 and not base.startswith((".", "/")):  # the hub takes its own names only
        yield f"base_model: {base}"
    yield "library_name: lora_drop_vllm"
    yield "tags: [lora-drop, vllm]"
    yield "---"


def _body(config: AdapterConfig, made_by: str, report: dict[str, Any] | None) -> Iterator[str]:
    base, n, sites = config.base_model, config.base_model.num_hidden_layers, config.sites
    saved = kv_saving(n, len(sites.layers), config.k) if config.kv == "skip" else 0.0
    name = config.base_model_name_or_path
    yield f"# LoRA-Drop adapter for {name}"
    yield ""
    yield (
        f"Between two full steps, vLLM decodes {config.k} tokens without {_left_out(config)}; a "
        "low-rank update of the stream takes the place of each."
    )
    yield from ("", *_table(("setting", "value"), _settings(config)))
    yield from (
        *("", f"Base model: {name} ({base})."),
        f"{_ideal(config)}{saved:.1%} of the KV of generated tokens is not written.",
    )
    if made_by:
        yield from ("", made_by)
    settings = json.dumps({"lora_drop": {"adapter": "PATH_OR_NAME_OF_THIS_ADAPTER"}})
    command = f"vllm serve {name} --model-impl lora_drop --additional-config '{settings}'"
    yield from ("", "## Use", "", "    pip install lora_drop_vllm", f"    {command}")
    if figures := _figures(report or {}):
        yield from ("", "## Quality beside the base model", "", *figures)


def _left_out(config: AdapterConfig) -> str:
    """What LoRA steps leave out, in words."""
    n, sites = config.base_model.num_hidden_layers, config.sites
    whole = f"{len(sites.whole)} of the {n} layers" if sites.whole else ""
    attention = ""
    if sites.attention_only:
        attention = f"the attention of {len(sites.attention_only)} of the {n} layers"
    return " and ".join(part for part in (whole, attention) if part)


def _ideal(config: AdapterConfig) -> str:
    """The ideal speed; nothing where it depends on the shape of the layers, as `check` knows it."""
    if config.sites.attention_only:
        return ""
    equal = [1.0] * config.base_model.num_hidden_layers
    return (
        f"Ideal speed {ideal_speed(equal, config.sites.whole, config.k, 0.0):.2f}x (layers alone); "
    )


def _settings(config: AdapterConfig) -> Iterator[tuple[str, str]]:
    yield "drop layers", ", ".join(map(str, config.drop_layers))
    if config.drop_attention:
        yield "attention of", ", ".join(map(str, config.drop_attention))
    for key in ("rho", "k", "r", "lora_alpha", "reuse", "kv", "injection"):
        yield f"`{key}`", f"{getattr(config, key)}"


def _figures(found: dict[str, Any]) -> list[str]:
    """Tables of an evaluation's figures; empty without an evaluation."""
    text = [
        (f"{found[part]['file']}, {kind} steps", *(f"{step[key]:.3f}" for key in STEP_FIGURES))
        for part in ("text", "chat")
        if part in found
        for kind, step in found[part]["steps"].items()
    ]
    tasks = [
        (task["task"], f"{task['accuracy']['share']:.3f}", f"{task['accuracy']['base']:.3f}")
        for task in found.get("tasks", ())
    ]
    tables = []
    if text:
        tables += _table(("text", *STEP_FIGURES.values()), text)
    if tasks:
        tables += ["", *_table(("task", "accuracy", "base"), tasks)]
    return tables


STEP_FIGURES = {
    "perplexity": "perplexity",
    "base_perplexity": "base",
    "kl": "KL",
    "agreement": "agreement",
}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
