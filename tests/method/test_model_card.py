"""The card beside an adapter: what it says, and whose card stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter

from lora_drop_vllm.model_card import CARD, FIGURES, OURS, write_card

STEP = {"tokens": 9, "perplexity": 41.5, "base_perplexity": 39.125, "kl": 0.25, "agreement": 0.75}
REPORT = {
    "model": "model",
    "text": {"file": "books.txt", "windows": 1, "steps": {"all": STEP}},
    "tasks": [{"task": "piqa", "accuracy": {"share": 0.5, "base": 0.625}}],
    "decoded": [],
}


@pytest.fixture
def config(tmp_path: Path, models: dict[str, Path]) -> Any:
    return make_adapter(tmp_path, models["llama"], drop_layers=[3, 5])[0]


def test_a_card_says_what_the_adapter_is(tmp_path: Path, config: Any) -> None:
    write_card(tmp_path, replace(config, base_model_name_or_path="org/base"), "Made by hand.")
    card = (tmp_path / CARD).read_text()
    assert card.startswith(f"---\n{OURS}\nbase_model: org/base\nlibrary_name: lora_drop_vllm\n")
    assert "| drop layers | 3, 5 |" in card and "| `k` | 3 |" in card and "Made by hand." in card
    assert "18.8% of the KV of generated tokens is not written" in card  # 2/8 layers, 3 of 4 steps
    assert "Quality" not in card


def test_a_card_names_the_layers_of_which_only_the_attention_drops(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    config, _ = make_adapter(tmp_path, models["llama"], drop_layers=[3], drop_attention=[4, 5])
    write_card(tmp_path, config)
    card = (tmp_path / CARD).read_text()
    assert "3 tokens without 1 of the 8 layers and the attention of 2 of the 8 layers;" in card
    assert "| drop layers | 3 |" in card and "| attention of | 4, 5 |" in card
    assert "28.1% of the KV" in card and "Ideal speed" not in card  # 3/8 layers, 3 of 4 steps


def test_a_local_base_model_is_no_name_for_the_hub(tmp_path: Path, config: Any) -> None:
    write_card(tmp_path, replace(config, base_model_name_or_path="/models/base"))
    assert "base_model:" not in (tmp_path / CARD).read_text()


def test_figures_of_an_evaluation(tmp_path: Path, config: Any) -> None:
    write_card(tmp_path, config, "Made by hand.")
    write_card(tmp_path, config, report=REPORT)
    card = (tmp_path / CARD).read_text()
    assert "| books.txt, all steps | 41.500 | 39.125 | 0.250 | 0.750 |" in card
    assert "| piqa | 0.500 | 0.625 |" in card and "Made by hand." in card


def test_a_new_adapter_has_no_figures_of_an_old_one(tmp_path: Path, config: Any) -> None:
    (tmp_path / FIGURES).write_text(json.dumps(REPORT))
    write_card(tmp_path, config, "Made by hand.", REPORT)
    write_card(tmp_path, config, "Made anew.")
    card = (tmp_path / CARD).read_text()
    assert "Made anew." in card and "Quality" not in card


def test_a_card_of_somebody_else_stays(tmp_path: Path, config: Any) -> None:
    (tmp_path / CARD).write_text("# Mine\n")
    write_card(tmp_path, config)
    assert (tmp_path / CARD).read_text() == "# Mine\n"
