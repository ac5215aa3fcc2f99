"""Weights loaded again into a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from serving import PROMPT, Serve, assert_same, settings_of
from tiny import load_model, make_adapter

pytestmark = pytest.mark.engine

DROP, TOKENS = [3, 4, 6], 9


@pytest.fixture
def moved(models: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny Llama with other weights."""
    model = load_model(models["llama"])
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


def test_the_oracles_tokens_after_a_reload(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], moved: Path, tmp_path: Path
) -> None:
    config, tensors = make_adapter(tmp_path / "adapter", models["llama"], drop_layers=DROP)
    engine = serve(models["llama"], {"adapter": str(tmp_path / "adapter")})
    settings = settings_of(config, tensors)
    before, after = Oracle(hf_models["llama"], settings), Oracle(load_model(moved), settings)
    old, new = before.decode(PROMPT, TOKENS), after.decode(PROMPT, TOKENS)
    assert old != new, "nothing would be tested"
    (got,) = engine.generate([PROMPT], TOKENS)
    assert_same(got, old, before)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(moved)})
    engine.llm.reset_prefix_cache()
    (got,) = engine.generate([PROMPT], TOKENS)
    assert_same(got, new, after)
    assert engine.counts()["lora"] > TOKENS


def test_a_packed_copy_of_old_weights_is_refused(serve: Serve, models: dict[str, Path]) -> None:
    """On a CPU, the drop layers' K and V projections are packed once and never again."""
    settings = {"untrained": True, "drop_layers": DROP, "kv": "write"}
    engine = serve(models["llama"], settings)
    with pytest.raises(RuntimeError, match=r"lora_drop\.kv='write'"):
        engine.llm.collective_rpc("reload_weights")
