"""KV blocks held by one request with LoRA-Drop and without, counted at the pool, beside Eq. 15.

python benchmarks/kv_saving.py
python benchmarks/kv_saving.py --rho 0.5 --k 3 --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import record
from engines import SHAPES, lora_drop, make_shape, quiet
from tqdm import tqdm

from lora_drop_vllm.method.cost import kv_saving
from lora_drop_vllm.method.layers import num_drop_layers


def bytes_held(model: str, settings: dict[str, Any] | None, prompt: int, tokens: int) -> int:
    """Most bytes of the pool's blocks that one request holds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=prompt + tokens,
        kv_cache_memory_bytes=1 << 28,
        **lora_drop(settings),
    )
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free, most = pool.get_num_free_blocks(), 0
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    core.add_request("r", {"prompt_token_ids": [7] * prompt}, params)
    with tqdm(total=tokens, desc="LoRA-Drop" if settings else "stock") as bar:
        while core.has_unfinished_requests():
            core.step()
            most = max(most, free - pool.get_num_free_blocks())
            bar.update()
    config = scheduler.kv_cache_config
    core.engine_core.shutdown()
    return most * (config.kv_cache_tensors[0].size // config.num_blocks)  # tensors share the pool


def main() -> None:
    """Parse, count, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="135m", help="shape, dummy weights")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    quiet()
    layers = SHAPES[arguments.model]["num_hidden_layers"]
    settings = {"untrained": True, "rho": arguments.rho, "k": arguments.k}
    with tempfile.TemporaryDirectory() as scratch:
        model = str(make_shape(Path(scratch) / "model", arguments.model))
        ours = bytes_held(model, settings, arguments.prompt, arguments.tokens)
        stock = bytes_held(model, None, arguments.prompt, arguments.tokens)
    formula = kv_saving(layers, num_drop_layers(arguments.rho, layers), arguments.k)
    metrics = {
        "bytes_held": ours,
        "bytes_held_stock": stock,
        "saved": round(1 - ours / stock, 4),
        "equation_15": round(formula, 4),
        "share_of_equation_15": round((1 - ours / stock) / formula, 3),
    }
    print(json.dumps(metrics, indent=2))
    record.write("kv_saving", vars(arguments), metrics)


if __name__ == "__main__":
    main()
