"""The compile path of a GPU, on a CPU: two compiled modules give the oracle's tokens.

Both kinds of step are a compiled module of their own. vLLM caches compiled graphs on disk; a graph
of the one module must never be taken for the other's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from environment import V2
from gpu_compile import keep_vllm_compile, own_cache
from oracle import Oracle
from serving import PROMPT, Engine, Serve, assert_same, settings_of
from tiny import load_model, make_adapter, make_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(V2, reason="compiled only under V1: the interpreter cannot be compiled"),
]

TOKENS = 9
# VLLM_USE_AOT_COMPILE, VLLM_USE_MEGA_AOT_ARTIFACT: what torch 2.12 and later take, as on GPUs,
# then what torch 2.11 and torch 2.9 take, then what nobody should
CACHES = {"torch-2.12": "11", "torch-2.11": "10", "torch-2.9": "00", "mixed": "01"}
USUAL = "torch-2.12"
MODELS = [
    pytest.param(family, reuse, kv, injection, id=f"{family}-{reuse}-{kv}-{injection}")
    for family in ("llama", "qwen2")
    for reuse, kv, injection in (
        ("update", "skip", "block"),
        ("previous", "write", "attn_mlp"),
        ("update", "skip", "attn_mlp"),
        ("previous", "write", "block"),
        ("update", "skip", "attn"),
        ("previous", "write", "attn"),
        ("update", "skip", "mixed"),
    )
]
TWO = (MODELS[0], MODELS[8])  # each family, KV mode and way to chain layers once
# Inductor without code of its own: a graph calls ATen's kernels, and no C++ is compiled
LITE = {"inductor_compile_config": {"fallback_by_default": True}}


def cases() -> list[Any]:
    """Every model in the usual cache, two of them in every cache; `make test` runs two, lite."""
    lite = [pytest.param(USUAL, True, *model.values, id=f"lite-{model.id}") for model in TWO]
    return lite + [
        pytest.param(
            cache, False, *model.values, id=f"{cache}-{model.id}", marks=pytest.mark.matrix
        )
        for cache in CACHES
        for model in MODELS
        if model in TWO or cache == USUAL
    ]


def start(serve: Serve, model: Path, adapter: Path, lite: bool) -> Engine:
    """An engine that compiles as in a fresh process."""
    torch._dynamo.reset()
    return serve(
        model,
        {"adapter": str(adapter)},
        enforce_eager=False,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        compilation_config=LITE if lite else {},
    )


def check_compiled(engine: Engine, from_disk: bool) -> None:
    """Both modules went through vLLM's own backend, split at attention.

    Layers' names are wrapped inside the traced forward, as vLLM does it: no module keeps one.
    """
    from vllm.config import CompilationMode
    from vllm.utils.torch_utils import LayerName

    compilation = engine.runner.compilation_config
    assert compilation.mode is CompilationMode.VLLM_COMPILE
    assert "vllm::unified_attention_with_output" in compilation.splitting_ops
    model = engine.runner.model
    assert not any(isinstance(v, LayerName) for m in model.modules() for v in vars(m).values())
    for module in (model.model, model.lora_step_model):
        assert not module.do_not_compile
        assert getattr(module, "was_aot_compile_fn_loaded_from_disk", False) == from_disk


@pytest.mark.parametrize(("cache", "lite", "family", "reuse", "kv", "injection"), cases())
def test_each_module_runs_its_own_graphs(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    lite: bool,
    family: str,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    keep_vllm_compile(monkeypatch)
    aot, mega = CACHES[cache]
    own_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", aot)
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", mega)
    folder, adapter = make_model(tmp_path / "model", family, num_layers=6), tmp_path / "adapter"
    config, tensors = make_adapter(
        adapter, folder, drop_layers=[3, 4], k=2, reuse=reuse, kv=kv, injection=injection
    )
    oracle = Oracle(load_model(folder), settings_of(config, tensors))
    want = oracle.decode(PROMPT, TOKENS)
    for warm in (False, True):
        engine = start(serve, folder, adapter, lite)
        (got,) = engine.generate([PROMPT], TOKENS)
        assert_same(got, want, oracle)
        assert engine.counts() == {"full": 3, "lora": 6}
        check_compiled(engine, from_disk=warm and aot == "1")
    if mega == "0":
        modules = {path.parent.name for path in tmp_path.rglob("vllm_compile_cache.py")}
        assert modules == {"backbone", "lora_step"}
