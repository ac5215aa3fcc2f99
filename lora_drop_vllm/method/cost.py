"""Closed forms of ideal speed (Eq. 7-11) and KV saving (Eq. 13-16), and sizes of KV blocks."""

from __future__ import annotations


def ideal_speed(layer_costs: list[float], drop_layers: list[int], k: int, rest: float) -> float:
    """Speed-up of decoding if a dropped layer cost nothing, S_ideal (Eq. 7-10).

    Args:
        layer_costs: c_i, the time of each layer in a full step, in any unit
        drop_layers: D
        k: LoRA steps between two full steps
        rest: c_h, the time of everything outside the layers, in the same unit
    """
    full = sum(layer_costs) + rest
    dropped = set(drop_layers)
    lora = sum(c for i, c in enumerate(layer_costs) if i not in dropped) + rest
    return (k + 1) * full / (k * lora + full)


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
    weight is layers times tokens. Among multiples of `unit`, the result is the pair with the
    smallest block whose `packing_waste` is at most `MAX_WASTE`, or else the pair with least waste.
    """
    pairs = [(p, q) for p in range(1, MAX_UNITS + 1) for q in range(1, MAX_UNITS + 1)]
    good = [pq for pq in pairs if packing_waste(num_always_on, num_drop, *pq) <= MAX_WASTE]
    if good:
        p, q = min(good, key=lambda pq: (max(num_always_on * pq[0], num_drop * pq[1]), pq))
    else:
        p, q = min(pairs, key=lambda pq: (packing_waste(num_always_on, num_drop, *pq), pq))
    return p * unit, q * unit


def packing_waste(num_always_on: int, num_drop: int, size_on: int, size_drop: int) -> float:
    """Share of a pool block that the lighter group leaves unused."""
    heavy, light = sorted((num_always_on * size_on, num_drop * size_drop), reverse=True)
    return 1 - light / heavy


MAX_WASTE = 0.03
MAX_UNITS = 64  # no block is longer than 64 kernel units (2,048 tokens on CPU)
