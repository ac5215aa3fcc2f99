"""KV blocks that LoRA steps do not take are there for other requests: counted at the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import Engine, Serve
from tiny import prompt_of

from lora_drop_vllm.method.cost import kv_saving
from lora_drop_vllm.method.layers import num_drop_layers

pytestmark = pytest.mark.engine

PROMPT, GENERATED = 32, 1024
SETTINGS: dict[str, Any] = {"untrained": True, "rho": 0.5, "k": 3}
ATTENTION = SETTINGS | {"injection": "attn"}
MIXED = {"untrained": True, "drop_layers": [9, 10, 12], "drop_attention": [*range(13, 24)], "k": 3}


def bytes_held_at_the_end(engine: Engine) -> int:
    """Most bytes of the pool that one request of PROMPT + GENERATED tokens holds."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    free = engine.pool.get_num_free_blocks()
    params = SamplingParams(temperature=0, max_tokens=GENERATED, ignore_eos=True)
    core.add_request("one", {"prompt_token_ids": prompt_of(PROMPT)}, params)
    most = 0
    while core.has_unfinished_requests():
        core.step()
        most = max(most, free - engine.pool.get_num_free_blocks())
    assert engine.pool.get_num_free_blocks() == free
    config = engine.scheduler.kv_cache_config
    return most * (config.kv_cache_tensors[0].size // config.num_blocks)


def stock_bytes(engine: Engine) -> int:
    """The same for the stock model, whose blocks hold a slot for every token but the last."""
    config = engine.scheduler.kv_cache_config
    blocks = -(-(PROMPT + GENERATED - 1) // config.kv_cache_groups[0].kv_cache_spec.block_size)
    return blocks * (config.kv_cache_tensors[0].size // config.num_blocks)


def gqa_shape(folder: Path) -> Path:
    """A 32-layer model with grouped queries, small enough for dummy weights on a CPU."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("shape", "num_layers", "settings"),
    [
        pytest.param("real", 30, SETTINGS, id="135M"),
        pytest.param("gqa", 32, SETTINGS, id="32-layer GQA"),
        pytest.param("real", 30, ATTENTION, id="135M-attention", marks=pytest.mark.matrix),
        pytest.param("gqa", 32, MIXED, id="32-layer GQA-mixed", marks=pytest.mark.matrix),
    ],
)
def test_saved_blocks_come_close_to_equation_15(
    serve: Serve,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    shape: str,
    num_layers: int,
    settings: dict[str, Any],
) -> None:
    """14 layers of 32 drop, or 13 of 30: in the mix, too."""
    model = request.getfixturevalue("real_model") if shape == "real" else gqa_shape(tmp_path)
    args: dict[str, Any] = dict(
        max_model_len=2048, kv_cache_memory_bytes=1 << 28, load_format="dummy"
    )
    ours = bytes_held_at_the_end(serve(model, settings, **args))
    config = serve.engine.scheduler.kv_cache_config
    assert len(config.kv_cache_groups) == 2
    block = config.kv_cache_tensors[0].size // config.num_blocks
    for group in config.kv_cache_groups:
        used = group.kv_cache_spec.page_size_bytes
        if not hasattr(group.kv_cache_spec, "kv_cache_specs"):
            used *= len(group.layer_names)
        assert used > 0.8 * block
    stock = stock_bytes(serve(model, **args))
    drop = num_drop_layers(SETTINGS["rho"], num_layers)
    assert 1 - ours / stock >= 0.92 * kv_saving(num_layers, drop, SETTINGS["k"])


def num_preemptions(engine: Engine, count: int) -> int:
    """Preemptions while `count` requests of 32 + 400 tokens decode side by side."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    for n in range(count):
        core.add_request(f"{count}-{n}", {"prompt_token_ids": prompt_of(32, seed=n)}, params)
    seen: dict[str, int] = {}
    while core.has_unfinished_requests():
        core.step()
        seen |= {i: r.num_preemptions for i, r in engine.scheduler.requests.items()}
    return sum(seen.values())


def test_the_same_pool_holds_more_requests(serve: Serve, tmp_path: Path) -> None:
    """17 stock blocks of 128 tokens: the stock model decodes 4 requests at once, ours 5."""
    model = gqa_shape(tmp_path)
    block = 128 * 32 * 2 * 32 * 4  # tokens, layers, K and V, head size, fp32
    args: dict[str, Any] = dict(load_format="dummy", kv_cache_memory_bytes=17 * block)
    stock = serve(model, **args)
    assert stock.pool.num_gpu_blocks == 17
    assert num_preemptions(stock, 4) == 0
    assert num_preemptions(stock, 5) > 0
    assert num_preemptions(serve(model, SETTINGS, **args), 5) == 0
