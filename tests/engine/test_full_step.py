"""What a full step leaves for LoRA steps: where the states come from, and that all of them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import PROMPT, Engine, Serve
from tiny import make_adapter
from torch import Tensor

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


def test_states_are_taken_behind_the_norms(
    serve: Serve, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a norm reads what an all-reduce would give: the two can be fused."""
    from lora_drop_vllm.engine import drop_layer

    engine = start(serve, models["llama"], tmp_path, injection="attn_mlp")
    reduced: list[Tensor] = []  # what attention and MLP of a step returned, kept in memory
    taken: list[bool] = []

    def note(module: Any, args: Any, output: tuple[Tensor, Any]) -> None:
        reduced.append(output[0])

    def watched(save: Any) -> Any:
        def run(x: Tensor, *rest: Any) -> None:
            taken.append(x.data_ptr() in [tensor.data_ptr() for tensor in reduced])
            save(x, *rest)

        return run

    model = engine.runner.model.model
    model.embed_tokens.register_forward_pre_hook(lambda *_: reduced.clear())
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_hook(note)
        layer.mlp.down_proj.register_forward_hook(note)
    for name in ("save_stream", "save_changes"):
        monkeypatch.setattr(drop_layer.ops, name, watched(getattr(drop_layer.ops, name)))
    engine.generate([PROMPT], 4)
    full = engine.counts()["full"]
    # two sites a layer; of each run of layers one more behind its last site
    assert len(taken) == full * (2 * len(DROP) + 2)
    assert not any(taken)
