"""KV blocks held by one request with LoRA-Drop and without, counted at the pool, beside Eq. 15.

The result is the mean over the second half of the answer. Both sides round up to whole blocks, so
that a single length would be a matter of luck.

python benchmarks/kv_saving.py
python benchmarks/kv_saving.py --rho 0.25 0.5 0.75 --k 1 2 3 5      for docs/quality.md (Fig. 3)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import record
from support.engines import SHAPES, lora_drop, lora_steps, make_shape, quiet
from tqdm import tqdm

from lora_drop_vllm.method.cost import kv_saving
from lora_drop_vllm.method.layers import num_drop_layers
from lora_drop_vllm.method.reuse import SITES


@contextmanager
def engine(model: str, settings: dict[str, Any] | None, given: argparse.Namespace) -> Iterator[Any]:
    """Engine in this process whose pool is large enough for one request."""
    from vllm import LLM

    found = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=given.prompt + given.tokens,
        kv_cache_memory_bytes=1 << 28,
        **lora_drop(settings),
    ).llm_engine
    yield found
    found.engine_core.shutdown()


def bytes_held(core: Any, k: int | None, given: argparse.Namespace) -> int:
    """Bytes of the pool's blocks that one request holds, mean over the answer's second half.

    Raises:
        RuntimeError: LoRA steps were asked for, and none ran.
    """
    from vllm import SamplingParams

    scheduler = core.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free, held, before = pool.get_num_free_blocks(), [], lora_steps(scheduler)
    extra = None if k is None else {"lora_drop_k": k}
    params = SamplingParams(
        temperature=0, max_tokens=given.tokens, ignore_eos=True, extra_args=extra
    )
    core.add_request("r", {"prompt_token_ids": [7] * given.prompt}, params)
    with tqdm(total=given.tokens, desc="stock" if k is None else f"k = {k}") as bar:
        while core.has_unfinished_requests():
            core.step()
            held.append(free - pool.get_num_free_blocks())
            bar.update()
    if k and lora_steps(scheduler) == before:
        raise RuntimeError(f"k = {k}: no LoRA step ran, so nothing was measured")
    config = scheduler.kv_cache_config
    block = config.kv_cache_tensors[0].size // config.num_blocks  # tensors share the pool
    return round(
        block * statistics.fmean(held[len(held) // 2 : -1])
    )  # after the last step a request holds none


def main() -> None:
    """Counts, prints and records."""
    given = _arguments()
    quiet()
    layers = SHAPES[given.model]["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        model = str(make_shape(Path(scratch) / "model", given.model))
        with engine(model, None, given) as core:
            stock = bytes_held(core, None, given)
        for rho in given.rho:
            settings = {"untrained": True, "rho": rho, "k": max(given.k)}
            settings |= {"injection": given.injection}
            with engine(model, settings, given) as core:
                held = {k: bytes_held(core, k, given) for k in given.k}
            for k, ours in held.items():
                formula = kv_saving(layers, num_drop_layers(rho, layers), k)
                metrics = {
                    "bytes_held": ours,
                    "bytes_held_stock": stock,
                    "saved": round(1 - ours / stock, 4),
                    "equation_15": round(formula, 4),
                    "share_of_equation_15": round((1 - ours / stock) / formula, 3),
                }
                print(json.dumps({"rho": rho, "k": k} | metrics, indent=2))
                kept = vars(given) | {"rho": rho, "k": k}
                if given.injection == "block":  # as in the records from before there was a choice
                    del kept["injection"]
                record.write("kv_saving", kept, metrics)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="135m", help="shape, dummy weights")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.5])
    parser.add_argument("--k", type=int, nargs="+", default=[3])
    parser.add_argument(
        "--injection", choices=SITES, default="block", help="what drops; attn: only the attention"
    )
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=992)
    return parser.parse_args()


if __name__ == "__main__":
    main()
