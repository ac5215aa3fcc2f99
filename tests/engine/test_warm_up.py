"""What runs before the first request: no kernel is left to compile, vLLM's warm-up does no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from environment import V2
from oracle import Oracle
from serving import PROMPT, Serve, assert_same, settings_of
from tiny import make_adapter

pytestmark = pytest.mark.engine

KERNELS = ("_compact_slots", "_run", "_save_changes", "_save_stream", "_shrink", "_update")


@pytest.mark.skipif(V2, reason="the runner makes no difference to our kernels")
def test_requests_compile_nothing() -> None:
    pytest.importorskip("triton.backends.nvidia.compiler")
    script = Path(__file__).parents[1] / "support/count_compiles.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    compiled = {name for one in counted.values() for name in one["start"]}
    assert compiled == {f"{name}_kernel" for name in KERNELS}
    assert not {where: one["requests"] for where, one in counted.items() if one["requests"]}


@pytest.mark.runners
@pytest.mark.skipif(not V2, reason="a warm-up of Model Runner V2")
@pytest.mark.parametrize("kv", ["skip", "write"])
def test_vllms_warm_up_runs_before_requests(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv: str,
) -> None:
    """A GPU's worker runs steps of its own making, without a plan of ours."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    # the interpreter cannot run vLLM's own kernels of grammars and of top-k and top-p
    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", lambda *args: None)
    monkeypatch.setattr(SamplingParams, "for_sampler_warmup", lambda: SamplingParams(temperature=0))
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=[3, 4, 6], kv=kv)
    engine = serve(models["llama"], {"adapter": str(tmp_path)}, max_num_seqs=4)
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    warmup_kernels(engine.runner, worker.execute_model, worker.sample_tokens)
    assert engine.counts() == {"full": 0, "lora": 0}
    (got,) = engine.generate([PROMPT], 10)
    oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, 10), oracle)
    assert engine.counts() == {"full": 3, "lora": 7}
