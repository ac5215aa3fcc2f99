"""Contexts that are filled instead of computed: the prompts are prefix hits, the KV is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import Serve, check_all_released
from support import filled_context
from support.engines import _decode

pytestmark = pytest.mark.engine

BATCH, PROMPT, TOKENS = 3, 256, 9


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"untrained": True, "drop_attention": [3, 4, 5]},
            id="attention",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            {"untrained": True, "drop_layers": [3, 4, 5]}, id="layers", marks=pytest.mark.matrix
        ),
        pytest.param(None, id="stock"),
    ],
)
def test_a_filled_prompt_costs_one_token(
    serve: Serve,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any] | None,
) -> None:
    """The first step computes the last token of each prompt; unless they are found, none does."""
    args: dict[str, Any] = dict(max_num_seqs=BATCH, max_num_batched_tokens=64)
    engine = serve(models["llama"], settings, load_format="dummy", **args)
    core, calls = engine.llm.llm_engine, []
    filled_context.write_cache(core)
    assert all(
        (cache == cache.flatten()[0]).all() and cache.any() for cache in engine.runner.kv_caches
    )
    execute = core.model_executor.execute_model

    def watched(planned: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(list(planned.num_scheduled_tokens.values()))
        return execute(planned, *args, **kwargs)

    core.model_executor.execute_model = watched
    for k in (0, 3):
        del calls[:]
        found = _decode(core, BATCH, PROMPT, TOKENS, None if settings is None else k, True)
        assert calls[:TOKENS] == [[1] * BATCH] * TOKENS
        assert len(found["times"]) == TOKENS - 1
        assert found["lora_steps"] == (6 if settings and k else 0)
    if settings:
        check_all_released(engine)
    monkeypatch.setattr(filled_context, "fill", lambda *_: None)
    assert engine.llm.reset_prefix_cache()
    with pytest.raises(RuntimeError, match="prompts of 256 tokens were not found whole"):
        _decode(core, BATCH, PROMPT, TOKENS, None, True)
