"""Graphs for both kinds of step, emulated: a replay runs the captured forward on captured tensors.

No GPU is needed. Like a graph, the emulation keeps the kind of the step and every tensor it was
captured with, so a wrong kind or a tensor that is not written in place gives wrong tokens. The one
thing it takes over from the step at hand is what attention on a CPU schedules on the host.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import V2
from oracle import Oracle
from serving import Engine, Serve, replay, settings_of
from tiny import make_adapter, prompt_of

from lora_drop_vllm.method.schedule import StepKind

pytestmark = [
    pytest.mark.engine,
    pytest.mark.runners,
    pytest.mark.skipif(not V2, reason="graphs for both kinds are Model Runner V2's"),
]

DROP = [3, 4, 6]


class Emulated:
    """Stands in for a `torch.cuda.CUDAGraph`."""

    def __init__(self, run: Any, metadata: dict[str, Any], engine: Engine, kind: StepKind) -> None:
        self.run, self.metadata, self.engine, self.kind = run, metadata, engine, kind

    def replay(self) -> None:
        from vllm.config.compilation import CUDAGraphMode

        for layer, captured in self.metadata.items():
            now = self.engine.runner.model_state.metadata[layer]
            assert (captured is None) == (now is None), "a graph of the wrong kind"
            if captured is not None:
                captured.scheduler_metadata = now.scheduler_metadata
        step = self.engine.runner.model.lora_drop
        plan = step._plan, step._rows
        step.rehearse(self.kind)
        self.run(CUDAGraphMode.NONE)
        step._plan, step._rows = plan


def make_manager(engine: Engine, monkeypatch: pytest.MonkeyPatch, mode: Any) -> Any:
    """A manager of the engine's model for graphs of 1, 2 and 4 tokens, in its runner."""
    from vllm.platforms import current_platform

    from lora_drop_vllm.engine.cuda_graphs import StepGraphManager

    monkeypatch.setattr(type(current_platform), "_global_graph_pool", object())
    runner = engine.runner
    runner.compilation_config.cudagraph_capture_sizes = [1, 2, 4]
    runner.compilation_config.max_cudagraph_capture_size = 4
    runner.cudagraph_manager = StepGraphManager(
        runner.model.lora_drop, runner.vllm_config, runner.device, mode, 1
    )
    return runner.cudagraph_manager


def capture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's manager capture emulated graphs."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from lora_drop_vllm.engine.cuda_graphs import KINDS

    runner = engine.runner
    prepare = runner.model_state.prepare_attn

    def keep(*args: Any, **kwargs: Any) -> Any:
        runner.model_state.metadata = prepare(*args, **kwargs)
        return runner.model_state.metadata

    def emulate(manager: Any, create: Any, *args: Any) -> None:
        for desc in (d for descs in manager._capture_descs.values() for d in descs):
            run = create(desc, warmup=False)
            run(CUDAGraphMode.NONE)
            metadata, kind = runner.model_state.metadata, KINDS[desc.num_active_loras]
            manager.graphs[desc] = Emulated(run, metadata, engine, kind)
        manager._graphs_captured = True

    monkeypatch.setattr(runner.model_state, "prepare_attn", keep)
    monkeypatch.setattr(CudaGraphManager, "capture", emulate)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
    runner.cudagraph_manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        runner.intermediate_tensors,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )


@pytest.mark.parametrize(
    ("reuse", "kv", "injection"),
    [
        ("update", "skip", "block"),
        ("previous", "write", "block"),
        pytest.param("update", "skip", "attn", marks=pytest.mark.matrix),
        pytest.param("previous", "skip", "mixed", marks=pytest.mark.matrix),
    ],
)
def test_graphs_of_both_kinds_give_the_oracles_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    from vllm.config.compilation import CUDAGraphMode

    config, tensors = make_adapter(
        tmp_path, models["llama"], drop_layers=DROP, k=2, reuse=reuse, kv=kv, injection=injection
    )
    engine = serve(models["llama"], {"adapter": str(tmp_path)}, max_num_seqs=4)
    manager = make_manager(engine, monkeypatch, CUDAGraphMode.FULL_DECODE_ONLY)
    capture(engine, monkeypatch)
    replayed: Counter[tuple[int, int]] = Counter()
    run_fullgraph = manager.run_fullgraph

    def counting(desc: Any) -> Any:
        replayed[desc.num_tokens, desc.num_active_loras] += 1
        return run_fullgraph(desc)

    monkeypatch.setattr(manager, "run_fullgraph", counting)
    engine.record()
    prompts = [prompt_of(n) for n in (5, 40, 11)]
    outputs = engine.generate(prompts, [9, 5, 3])
    ids = list(dict.fromkeys(i for step in engine.steps for i in step.requests))
    for request_id, prompt, output in zip(ids, prompts, outputs, strict=True):
        oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
        assert output.tokens == replay(engine.steps, request_id, prompt, oracle)

    decodes = [s for s in engine.steps if all(n == 1 for _, n in s.requests.values())]
    sizes = {1: 1, 2: 2, 3: 4}  # three requests run in the graph of four
    planned = Counter((sizes[len(s.requests)], int(s.kind == "lora")) for s in decodes)
    assert replayed == planned
    assert {kind for _, kind in replayed} == {0, 1}
    lora = sum(step.kind == "lora" for step in engine.steps)
    assert engine.counts() == {"full": len(engine.steps) - lora, "lora": lora}


def test_each_kind_finds_only_its_own_graphs(
    serve: Serve, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config.compilation import CUDAGraphMode

    settings = {"untrained": True, "drop_layers": DROP, "k": 2}
    engine = serve(models["llama"], settings, max_num_seqs=3)
    manager = make_manager(engine, monkeypatch, CUDAGraphMode.FULL_AND_PIECEWISE)
    manager._graphs_captured = True
    step = engine.runner.model.lora_drop
    found = {}
    for kind in StepKind:
        step.rehearse(kind)
        found[kind] = [manager.dispatch(n, n, 1, 0) for n in (1, 2, 3)]
    step.end()
    assert all(d.num_active_loras == 0 for d in found[StepKind.FULL])
    assert all(d.num_active_loras == 1 for d in found[StepKind.LORA])
    # three requests are below no full-graph size (4 > max_num_seqs): a piecewise one serves them
    modes = [CUDAGraphMode.FULL, CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE]
    assert [d.cg_mode for d in found[StepKind.LORA]] == modes
    captured = set().union(*manager._capture_descs.values())
    assert {d for d in captured if d.num_active_loras} == set(found[StepKind.LORA])

    step.rehearse(StepKind.LORA)
    step._rows = [object()]  # a step with a request
    with pytest.raises(RuntimeError, match="lora step was run as a full step"):
        manager.run_fullgraph(found[StepKind.FULL][0])
    step.end()
