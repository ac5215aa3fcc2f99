"""Two worker processes, each with half of every layer: states are whole on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from environment import V2
from oracle import Oracle
from serving import PROMPT, Serve, assert_same, settings_of
from tiny import make_adapter

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="the interpreter needs a stand-in backend in every process"),
]

TOKENS, DROP, LAYERS = 24, [3, 4, 6], 8


@pytest.mark.parametrize(
    ("family", "reuse", "kv", "injection"),
    [
        ("llama", "update", "skip", "block"),
        ("qwen2", "previous", "write", "attn_mlp"),
        pytest.param("llama", "update", "skip", "attn", marks=pytest.mark.matrix),
        pytest.param("qwen2", "anchor", "write", "mixed", marks=pytest.mark.matrix),
    ],
)
def test_two_workers_give_the_oracles_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, tensors = make_adapter(
        tmp_path, models[family], drop_layers=DROP, reuse=reuse, kv=kv, injection=injection
    )
    engine = serve(
        models[family],
        {"adapter": str(tmp_path)},
        tensor_parallel_size=2,
        worker_extension_cls="tp_probe.Probe",
    )
    engine.llm.collective_rpc("watch_collectives")
    (got,) = engine.generate([PROMPT], TOKENS)
    oracle = Oracle(hf_models[family], settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, TOKENS), oracle)

    first, second = engine.llm.collective_rpc("witness")
    assert first == second
    full = TOKENS // 4
    assert first["steps"] == {"full": full, "lora": TOKENS - full}
    # the embedding, then attention and MLP of each layer that runs
    assert first["reduced"]["full"] == full * (1 + 2 * LAYERS)
    attentions = {"attn": 3, "mixed": 1}.get(injection, 0)  # layers whose MLP runs
    dropped = 2 * len(DROP) - attentions
    assert first["reduced"]["lora"] == (TOKENS - full) * (1 + 2 * LAYERS - dropped)
