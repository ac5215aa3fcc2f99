"""On a GPU: real CUDA graphs for both kinds of step, held to the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from serving import PROMPT, Serve, assert_same, replay, settings_of
from tiny import make_adapter, prompt_of

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

DROP, TOKENS = [3, 4, 6], 32
GRAPHS: dict[str, Any] = dict(
    enforce_eager=False,
    attention_backend="TRITON_ATTN",  # fp32 as the oracle has it, see `environment`
    max_num_seqs=4,
    compilation_config={"cudagraph_capture_sizes": [1, 2, 4]},
)


def replayed(engine: Any) -> dict[str, int]:
    """Full-graph replays by kind, from here on."""
    manager = engine.runner.cudagraph_manager
    counts = {"full": 0, "lora": 0}
    for desc, graph in manager.graphs.items():
        kind = "lora" if desc.num_active_loras else "full"
        manager.graphs[desc] = _Counted(graph, counts, kind)
    return counts


class _Counted:
    def __init__(self, graph: Any, counts: dict[str, int], kind: str) -> None:
        self.graph, self.counts, self.kind = graph, counts, kind

    def replay(self) -> None:
        self.counts[self.kind] += 1
        self.graph.replay()


@pytest.mark.parametrize(
    ("reuse", "kv", "injection"),
    [
        ("previous", "skip", "attn_mlp"),
        ("anchor", "write", "block"),
        ("update", "write", "attn_mlp"),
        ("none", "skip", "block"),
        ("previous", "write", "attn"),
    ],
)
def test_eager_on_a_gpu_gives_the_oracles_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    config, tensors = make_adapter(
        tmp_path, models["qwen2"], drop_layers=DROP, reuse=reuse, kv=kv, injection=injection
    )
    engine = serve(models["qwen2"], {"adapter": str(tmp_path)}, attention_backend="TRITON_ATTN")
    (got,) = engine.generate([PROMPT], TOKENS)
    oracle = Oracle(hf_models["qwen2"], settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, TOKENS), oracle)


@pytest.mark.parametrize(
    ("reuse", "kv", "injection"),
    [
        ("update", "skip", "block"),
        ("previous", "write", "attn_mlp"),
        ("none", "skip", "block"),
        ("update", "skip", "attn"),
    ],
)
def test_graphs_of_both_kinds_give_the_oracles_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    config, tensors = make_adapter(
        tmp_path, models["llama"], drop_layers=DROP, reuse=reuse, kv=kv, injection=injection
    )
    engine = serve(models["llama"], {"adapter": str(tmp_path)}, **GRAPHS)
    counts = replayed(engine)
    engine.record()
    prompts = [prompt_of(n) for n in (5, 40, 11)]
    outputs = engine.generate(prompts, [20, 7, 15])
    ids = list(dict.fromkeys(i for step in engine.steps for i in step.requests))
    for request_id, prompt, output in zip(ids, prompts, outputs, strict=True):
        oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
        assert output.tokens == replay(engine.steps, request_id, prompt, oracle)
    decodes = [s for s in engine.steps if all(n == 1 for _, n in s.requests.values())]
    lora = sum(step.kind == "lora" for step in decodes)
    assert counts == {"full": len(decodes) - lora, "lora": lora}
    assert engine.counts()["lora"] == lora


def test_memory_of_the_second_set_of_graphs_is_bounded(
    serve: Serve, models: dict[str, Path]
) -> None:
    settings = {"untrained": True, "drop_layers": DROP}
    taken = serve(models["llama"], settings, **GRAPHS).runner.cudagraph_manager.taken
    full, lora = (taken[kind] for kind in taken)
    assert lora <= max(full, 64 << 20), "both sets share one pool"
