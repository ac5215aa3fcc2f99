"""What a full step leaves for LoRA steps: where the states come from, and that all of them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from environment import V2
from oracle import Oracle
from serving import PROMPT, Engine, Serve, assert_same, settings_of
from tiny import make_adapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_drop_vllm.engine import witness

pytestmark = [pytest.mark.engine, pytest.mark.runners]

DROP = [3, 4, 6]


def start(serve: Serve, model: Path, adapter: Path, **settings: Any) -> Engine:
    make_adapter(adapter, model, drop_layers=DROP, k=2, **settings)
    return serve(model, {"adapter": str(adapter)})


@pytest.mark.parametrize("reuse", ["update", "previous"])
def test_a_drop_layer_that_did_not_run_as_one_stops_the_engine(
    serve: Serve, models: dict[str, Path], tmp_path: Path, reuse: str
) -> None:
    engine = start(serve, models["llama"], tmp_path, reuse=reuse)
    engine.runner.model.model.layers[7].input_layernorm._forward_hooks.clear()  # behind layer 6
    if reuse == "update":  # of a difference both ends count
        engine.runner.model.model.layers[6].input_layernorm._forward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"layers \[6\] of lora_drop\.drop_layers did not run"):
        engine.generate([PROMPT], 4)


@pytest.mark.skipif(V2, reason="one runner is enough: the hooks are the model's")
def test_an_attention_whose_end_is_not_watched_stops_the_engine(
    serve: Serve, models: dict[str, Path], tmp_path: Path
) -> None:
    engine = start(serve, models["llama"], tmp_path, injection="attn")
    engine.runner.model.model.layers[4].post_attention_layernorm._forward_hooks.clear()
    engine.runner.model.model.layers[4].input_layernorm._forward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"layers \[4\] of lora_drop\.drop_layers did not run"):
        engine.generate([PROMPT], 4)


def test_the_witness_looks_once(
    serve: Serve, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_drop_vllm.engine import worker

    looked = []

    def counting(*args: Any) -> Any:
        looked.append(args)
        return witness.states_filled(*args)

    monkeypatch.setattr(worker, "states_filled", counting)
    engine = start(serve, models["llama"], tmp_path)
    for _ in range(2):
        engine.generate([PROMPT, PROMPT[:3]], 4)
    assert engine.counts()["full"] > 2 and len(looked) == 1


class Readers(TorchDispatchMode):
    """Notes what reads a tensor before the norm behind it does."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Tensor | None = None
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waiting is not None and any(
            isinstance(arg, Tensor) and arg.data_ptr() == self.waiting.data_ptr() for arg in args
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_only_norms_read_what_an_all_reduce_gives(
    serve: Serve, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM fuses an all-reduce with the norm behind it where nothing else reads its result."""
    from lora_drop_vllm.engine import drop_layer

    engine = start(serve, models["llama"], tmp_path, injection="attn_mlp")
    readers, reduced, saved = Readers(), [], []

    def reduce(module: Any, args: Any, output: tuple[Tensor, Any]) -> None:
        readers.waiting = output[0]
        reduced.append(output[0])

    def norm(module: Any, args: Any) -> None:
        readers.waiting = None

    def watched(save: Any) -> Any:
        def run(x: Tensor, *rest: Any) -> None:
            saved.append(x.data_ptr() in [tensor.data_ptr() for tensor in reduced])
            save(x, *rest)

        return run

    model = engine.runner.model.model
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_hook(reduce)
        layer.mlp.down_proj.register_forward_hook(reduce)
        layer.input_layernorm.register_forward_pre_hook(norm)
        layer.post_attention_layernorm.register_forward_pre_hook(norm)
    model.norm.register_forward_pre_hook(norm)
    for name in ("save_stream", "save_changes"):
        monkeypatch.setattr(drop_layer.ops, name, watched(getattr(drop_layer.ops, name)))
    with readers:
        engine.generate([PROMPT], 1)
    assert engine.counts() == {"full": 1, "lora": 0}
    assert len(reduced) == 2 * len(model.layers) and not readers.found
    # two sites a layer; of each run of layers one more behind its last site
    assert len(saved) == 2 * len(DROP) + 2 and not any(saved)


def test_dummy_batches_leave_the_states_alone(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM runs one where a data-parallel rank has no request; here before every step."""
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=DROP, k=2)
    engine = serve(models["llama"], {"adapter": str(tmp_path)})
    schedule, worker = engine.scheduler.schedule, engine.llm.llm_engine.model_executor.driver_worker

    def after_a_dummy(*args: Any, **kwargs: Any) -> Any:
        worker.worker.execute_dummy_batch()
        return schedule(*args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "schedule", after_a_dummy)
    (got,) = engine.generate([PROMPT], 7)
    oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, 7), oracle)
    assert engine.counts() == {"full": 3, "lora": 4}
