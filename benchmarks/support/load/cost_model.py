"""Time of an engine step: what it reads over the bandwidth, plus what it computes over the flops.

Reading and computing are added up, as if nothing overlapped. Both kinds of cost are linear in their
constants, so those of a machine can be fitted to measured steps by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.gpu_memory import layer_token_bytes


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    Attributes:
        bandwidth: bytes/s
        flops: floating point operations per second
        step_s: seconds that every step takes besides
        row_s: seconds that each request of a step takes besides
    """

    name: str
    bandwidth: float
    flops: float
    step_s: float = 0.0
    row_s: float = 0.0

    def seconds(self, step: Step, model: Model) -> float:
        """Time of a step."""
        steps, rows, read, computed = model.costs(step)
        return (
            steps * self.step_s + rows * self.row_s + read / self.bandwidth + computed / self.flops
        )


# NVIDIA H100 SXM by its datasheet: HBM3, and dense bfloat16 on the tensor cores
H100 = Machine("H100, datasheet", bandwidth=3.35e12, flops=989e12)


@dataclass(frozen=True)
class Step:
    """The work of an engine step.

    Attributes:
        tokens, rows: scheduled tokens and requests
        read, read_drop: tokens of KV that an always-on layer reads, and a drop layer
        pairs, pairs_drop: pairs of a token and one that it attends to, likewise
        lora: whether it is a LoRA step
    """

    tokens: int
    rows: int
    read: float
    read_drop: float
    pairs: float
    pairs_drop: float
    lora: bool


@dataclass(frozen=True)
class Model:
    """Sizes that a step's time depends on.

    Attributes:
        layer, head: weights of a layer, and of what turns the stream into logits
        kv_bytes: K and V of a token in a layer
        width: heads times head size
        size: bytes of a number
        drop: |D|; 0 for stock vLLM
        low_rank: numbers in A and B of a drop layer
    """

    layers: int
    layer: int
    head: int
    kv_bytes: int
    width: int
    size: int
    drop: int = 0
    low_rank: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], size: int, drop: int, rank: int) -> Model:
        """The sizes of a Llama or Qwen2 model, by its `config.json`."""
        d, heads = config["hidden_size"], config["num_attention_heads"]
        width = (config.get("head_dim") or d // heads) * heads
        kv = layer_token_bytes(config, size)
        layer = d * (2 * width + kv // size + 3 * config["intermediate_size"])
        head = d * config["vocab_size"]
        return cls(config["num_hidden_layers"], layer, head, kv, width, size, drop, 2 * rank * d)

    def costs(self, step: Step) -> tuple[float, float, float, float]:
        """Steps, rows, bytes read, and floating point operations of a step.

        A LoRA step reads and computes A and B in the drop layers, and no KV.
        """
        on, active = self.layers - self.drop, self.layers - self.drop * step.lora
        weights = active * self.layer + self.drop * self.low_rank * step.lora
        full = not step.lora
        return (
            1.0,
            step.rows,
            self.size * (weights + self.head)
            + self.kv_bytes * (on * step.read + self.drop * step.read_drop * full),
            2.0 * step.tokens * weights
            + 2.0 * step.rows * self.head
            + 4.0 * self.width * (on * step.pairs + self.drop * step.pairs_drop * full),
        )


def prompt_step(tokens: int) -> Step:
    """The step of a lone prompt."""
    pairs = tokens * (tokens + 1) / 2
    return Step(tokens, 1, tokens, tokens, pairs, pairs, False)


def fit(name: str, found: Sequence[tuple[Model, Step, float]]) -> Machine:
    """The constants that fit measured steps best, by least squares of the relative errors.

    Args:
        found: steps, and the seconds that they took

    Raises:
        ValueError: bandwidth and flops cannot be told apart from these steps.
    """
    costs = np.array([model.costs(step) for model, step, _ in found])
    scaled = costs / np.array([[seconds] for *_, seconds in found])
    columns = list(range(costs.shape[1]))
    while True:
        units = np.abs(scaled[:, columns]).max(axis=0)
        values = np.linalg.lstsq(scaled[:, columns] / units, np.ones(len(found)), rcond=None)[0]
        constants = dict(zip(columns, values / units, strict=True))
        if min(values) > 0:
            break
        columns.remove(columns[int(np.argmin(values))])  # a constant below 0 means that it is none
    if not {2, 3} <= set(columns):
        raise ValueError("the steps do not tell reading from computing; measure more batch sizes")
    step_s, row_s = constants.get(0, 0.0), constants.get(1, 0.0)
    return Machine(name, 1 / constants[2], 1 / constants[3], float(step_s), float(row_s))
