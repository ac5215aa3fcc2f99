"""Count what Triton compiles at start-up and what with requests, without a GPU; print what for.

The engine computes with the reference, and nothing is compiled or launched. Each launch computes
its specialisation key as on a GPU, from the engine's real arguments. A key that is new after the
start is a compilation that a request would wait for.

python count_compiles.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_kernels
import environment  # noqa: F401
import torch
import triton
from serving import Serve
from tiny import make_adapter, prompt_of

from lora_drop_vllm.kernels import ops, reference
from lora_drop_vllm.kernels.reference import Update

MAX_REQUESTS = 70  # beyond the rows that one launch takes for a whole run
keys: set[tuple[str, str]] = set()


def note_and_skip(**launch: Any) -> bool:
    """Triton's hook before a compilation: keeps the key and skips the compilation."""
    keys.add((launch["fn"].name.rpartition(".")[2], launch["key"]))
    return True


def launch_as_well(name: str, launch: Callable[..., Any]) -> None:
    """Makes an operator on a CPU also call the Triton launcher; the reference gives the result."""
    compute = getattr(reference, name)

    def both(*args: Any) -> Any:
        launch(*args)
        return compute(*args)

    setattr(reference, name, both)


def new_keys(run: Callable[[], Any]) -> list[str]:
    """The kernels that get a new key during a run."""
    before = set(keys)
    run()
    return sorted(name for name, _ in keys - before)


def count_in_engine(
    serve: Serve, scratch: Path, d: int, r: int, drop_layers: list[int], **adapter: Any
) -> dict[str, list[str]]:
    """Compilations of an engine, at its start and for batches of 1 to MAX_REQUESTS requests."""
    from transformers import LlamaConfig

    model = scratch / "model"
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=512,
        hidden_size=d,
        head_dim=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(model)
    make_adapter(scratch / "adapter", model, drop_layers=drop_layers, k=2, r=r, **adapter)

    def start() -> None:
        engine = serve(
            model,
            {"adapter": str(scratch / "adapter")},
            load_format="dummy",
            max_model_len=256,
            max_num_seqs=MAX_REQUESTS,
            max_num_batched_tokens=128,  # prompts come in chunks
        )
        engine.runner.profile_run()  # a GPU worker does this to measure its memory

    def run_requests() -> None:
        assert serve.engine is not None
        prompts = [prompt_of(3 + n) for n in range(MAX_REQUESTS)]
        serve.engine.generate(prompts, [2 + n for n in range(MAX_REQUESTS)])
        assert min(serve.engine.counts().values()) > MAX_REQUESTS // 4

    return {"start": new_keys(start), "requests": new_keys(run_requests)}


def count_in_run(layers: int, d: int, r: int) -> dict[str, list[str]]:
    """Compilations of a run of layers of a real size, in warm-up and for every number of rows."""
    from lora_drop_vllm.config import resolve
    from lora_drop_vllm.engine.drop_layer import DropRun
    from lora_drop_vllm.method.adapter import BaseModel
    from lora_drop_vllm.method.sites import Site

    config = resolve({"untrained": True}, BaseModel("llama", 32, d))
    states = torch.zeros(layers, 4, d, dtype=torch.bfloat16)
    slots = torch.full((300,), -1)
    site = Site(states.new_zeros(r, d), states.new_zeros(d, r))
    run = DropRun(config, [site] * layers, states, slots)

    update = Update(run.A, run.B, run.scale, run.rule.beta, run.rule.writes_back)

    def run_rows() -> None:
        for rows in range(1, len(slots) + 1):
            x = states.new_empty(rows, d)
            ops.triton_kernels()["drop_run"](x, states, slots[:rows], update)

    return {"start": new_keys(run.warm_up), "requests": new_keys(run_rows)}


def main() -> None:
    """Counts the compilations and prints one JSON line."""
    triton.runtime.driver.set_active(build_kernels.stand_in(90))
    triton.knobs.runtime.jit_cache_hook = note_and_skip
    for kernel, launcher in ops.triton_kernels().items():
        launch_as_well(kernel, launcher)
    counted = {}
    serve = Serve()
    engines: dict[str, dict[str, Any]] = {
        "chain": dict(d=128, r=4, drop_layers=[3, 5, 6]),
        "split": dict(
            d=4096, r=32, drop_layers=[3, 4, 6], reuse="previous", kv="write", injection="attn_mlp"
        ),
    }
    for name, shape in engines.items():
        keys.clear()
        with tempfile.TemporaryDirectory() as scratch:
            counted[name] = count_in_engine(serve, Path(scratch), **shape)
    serve.stop()
    for layers, d, r in [(1, 4096, 16), (13, 576, 16), (14, 4096, 16), (22, 5120, 64)]:
        keys.clear()
        counted[f"{layers} layers, d {d}, r {r}"] = count_in_run(layers, d, r)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
