"""Closed forms of ideal speed (Eq. 7-11) and KV saving (Eq. 13-16), and sizes of KV blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_drop_vllm.method.sites import AdapterSites


def ideal_speed(
    layer_costs: Sequence[float],
    drop_layers: Iterable[int],
    k: int,
    rest: float,
    attention_only: Iterable[int] = (),
    share: float = 0.0,
) -> float:
    """Speed-up of decoding if what drops cost nothing, S_ideal (Eq. 7-10).

    Args:
        layer_costs: c_i, the time of each layer in a full step, in any unit
        drop_layers: the layers that drop whole
        k: LoRA steps between two full steps
        rest: c_h, the time of everything outside the layers, in the same unit
        attention_only: the layers of which only the attention drops
        share: of c_i, what the attention of layer i takes
    """
    full = sum(layer_costs) + rest
    dropped = sum(layer_costs[i] for i in drop_layers)
    dropped += share * sum(layer_costs[i] for i in attention_only)
    return (k + 1) * full / (k * (full - dropped) + full)


@dataclass(frozen=True, slots=True)
class LayerReads:
    """The number of values that one decoder layer reads in a step.

    Attributes:
        attention, mlp: weights
        token: keys and values of one token of context
    """

    attention: int
    mlp: int
    token: int

    @classmethod
    def of(cls, config: Any) -> LayerReads:
        """The reads of a layer of a Hugging Face config of Llama's form, biases and norms aside."""
        d, heads = config.hidden_size, config.num_attention_heads
        size = head_dim(config)
        token = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
        return cls(d * (2 * heads * size + token), 3 * d * config.intermediate_size, token)

    def share(self, context: int = 0) -> float:
        """The share of the attention, if a step reads `context` tokens of all its requests."""
        attention = self.attention + context * self.token
        return attention / (attention + self.mlp)


def head_dim(config: Any) -> int:
    """Size of an attention head of a Hugging Face config."""
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def layers_only_speed(
    num_layers: int, sites: AdapterSites, k: int, reads: LayerReads, context: int = 0
) -> float:
    """S_ideal if only the layers cost time, all the same, in proportion to what they read."""
    equal, share = [1.0] * num_layers, reads.share(context)
    return ideal_speed(equal, sites.whole, k, 0.0, sites.attention_only, share)


def kv_saving(num_layers: int, num_drop: int, k: int) -> float:
    """Share of decode-time KV that is never written (Eq. 15 with w = k + 1).

    (1 - a/n) * rho * (1 - 1/(k+1)) with rho * (n - a) = |D|, so |D|/n * k/(k+1).
    """
    return num_drop / num_layers * k / (k + 1)


def kv_slots(prompt: int, decoded: int, k: int) -> int:
    """KV slots of a lone request in a drop layer (`kv: skip`): its prompt and its refreshes."""
    return prompt + decoded // (k + 1)


def packed_block_sizes(num_always_on: int, num_drop: int, unit: int) -> tuple[int, int]:
    """Tokens per KV block of always-on and of drop layers, chosen so that blocks weigh the same.

    One block pool serves both groups. Each block takes the bytes of the heavier group, whose
    weight is layers times tokens. Small blocks waste least at the end of a request, well matched
    ones least in each block. Among multiples of `unit` whose `packed_saving` is at least
    `MIN_SAVING`, the result is the pair that a typical request fills with the fewest bytes; if
    there is none, the pair that saves most.
    """

    def held(sizes: tuple[int, int]) -> float:
        prompt = answer = TYPICAL_TOKENS
        blocks = (prompt + answer) / sizes[0] + (prompt + answer / (TYPICAL_K + 1)) / sizes[1]
        heavier = max(num_always_on * sizes[0], num_drop * sizes[1])
        return heavier * (blocks + 1)  # the last block of each list is half empty on average

    def saving(sizes: tuple[int, int]) -> float:
        return packed_saving(num_always_on, num_drop, *sizes)

    multiples = range(unit, MAX_UNITS * unit + 1, unit)
    pairs = [(p, q) for p in multiples for q in multiples]
    good = [sizes for sizes in pairs if saving(sizes) >= MIN_SAVING]
    return min(good, key=held) if good else max(pairs, key=saving)


def packed_saving(num_always_on: int, num_drop: int, size_on: int, size_drop: int) -> float:
    """Share of Eq. 15's saving (at k = 3) that is left to an endless answer in such blocks."""
    num_layers = num_always_on + num_drop
    heavier = max(num_always_on * size_on, num_drop * size_drop)
    held = heavier / size_on + heavier / size_drop / (TYPICAL_K + 1)  # layers per token
    return (1 - held / num_layers) / kv_saving(num_layers, num_drop, TYPICAL_K)


def packing_waste(num_always_on: int, num_drop: int, size_on: int, size_drop: int) -> float:
    """Share of a pool block that the lighter group leaves unused."""
    heavy, light = sorted((num_always_on * size_on, num_drop * size_drop), reverse=True)
    return 1 - light / heavy


TYPICAL_TOKENS, TYPICAL_K = 256, 3  # of a request's prompt and of its answer
MIN_SAVING = 0.95
MAX_UNITS = 64  # no block is longer than 64 kernel units (2,048 tokens on CPU)
