"""What engines need of a GPU's memory, worked out before one is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from lora_drop_vllm.method.cost import packed_block_sizes

USABLE = 0.95  # of a card; the rest is the driver's, and room for what is estimated
# of one engine besides weights and KV: CUDA context, activations of a step of 16,384 tokens, the
# graphs of both kinds of step. An estimate, as the card that would confirm it is missing.
ENGINE_BYTES = 4 << 30
UNIT = 16  # tokens of stock vLLM's KV blocks on a GPU, and what ours are multiples of
CPU_UNIT = 128  # on a CPU, where ours may also be smaller


def card_bytes() -> int | None:
    """The memory of the first GPU; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def weight_bytes(config: Mapping[str, Any], size: int) -> int:
    """The weights of a Llama or Qwen2 model, by its `config.json` and the bytes of a number."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    width = (config.get("head_dim") or d // heads) * (
        2 * heads + 2 * (config.get("num_key_value_heads") or heads)
    )
    layer = d * (width + 3 * config["intermediate_size"] + 2)
    embeddings = d * config["vocab_size"] * (1 if config.get("tie_word_embeddings") else 2)
    return int(size * (config["num_hidden_layers"] * layer + embeddings))


def layer_token_bytes(config: Mapping[str, Any], size: int) -> int:
    """K and V of one token in one layer."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * size * (config.get("num_key_value_heads") or heads) * width)


def pool_bytes(
    config: Mapping[str, Any],
    size: int,
    requests: int,
    length: int,
    num_drop: int,
    unit: int = UNIT,
) -> int:
    """A KV pool in which so many requests of `length` tokens run at once, stock or not.

    Every request may leave a block of each of the two groups nearly empty.
    """
    layers = config["num_hidden_layers"]
    groups: list[tuple[int, int]] = [(layers, unit)]  # stock: layers and tokens of a block
    if num_drop:
        on, drop = packed_block_sizes(layers - num_drop, num_drop, unit)
        groups = [(layers - num_drop, on), (num_drop, drop)]
    block = max(count * tokens for count, tokens in groups)
    blocks = requests * sum(ceil((length + 1) / tokens) + 1 for _, tokens in groups) + 1
    packed = block * blocks
    stock = layers * unit * (requests * (ceil((length + 1) / unit) + 1) + 1)
    return max(packed, stock) * layer_token_bytes(config, size)


def engine_bytes(config: Mapping[str, Any], size: int, pool: int) -> int:
    """All that one engine takes."""
    return weight_bytes(config, size) + pool + ENGINE_BYTES


def utilization(need: int, card: int) -> float:
    """vLLM's `gpu_memory_utilization` for an engine of this need.

    vLLM wants that share of the card to be free at its start, also where the size of the KV pool is
    given; by default nearly all of it.
    """
    return min(ceil(1000 * need / card) / 1000, USABLE)


def plan(engines: Sequence[int], card: float, take_turns: bool) -> str:
    """How engines run on a card: `together`, `one after the other`, or why not at all.

    Args:
        engines: need of each, in bytes
        card: its memory in bytes
        take_turns: whether they need not be alive at once
    """
    if sum(engines) <= USABLE * card:
        return "together"
    if take_turns and max(engines) <= USABLE * card:
        return "one after the other"
    least = max(engines) if take_turns else sum(engines)
    return f"refused: needs {least / 1e9:.0f} of {USABLE * card / 1e9:.0f} GB"
