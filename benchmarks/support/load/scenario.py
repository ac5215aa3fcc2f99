"""What is simulated: a model on a machine, its KV pool, and vLLM's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.method.cost import packed_block_sizes
from support.gpu_memory import UNIT, layer_token_bytes
from support.load.client import Offer, Run, Shape
from support.load.cost_model import Machine, Model
from support.load.dry_core import Core
from support.load.figures import VARIANTS, Rounds, saturation
from support.load.simulation import Engine, arrivals

RANK = 16  # of the adapter


@dataclass(frozen=True)
class Scenario:
    """A served model and the limits that it is served with.

    Attributes:
        prepared: `dry_core.prepare`
        config: of the model, as in its `config.json`
        size: bytes of a number
        num_drop: |D|
        pool: bytes of KV cache
        units: tokens of stock vLLM's KV blocks, and what those of LoRA-Drop are multiples of
        spread: of the lengths around their shape (`simulation.arrivals`)
    """

    prepared: Any
    machine: Machine
    config: dict[str, Any]
    size: int
    num_drop: int
    k: int
    pool: int
    max_requests: int
    max_batched_tokens: int
    async_scheduling: bool
    units: tuple[int, int] = (UNIT, UNIT)
    spread: float = 0.0

    def model(self, name: str) -> Model:
        """Sizes of a variant's model."""
        return Model.of(self.config, self.size, 0 if name == "stock" else self.num_drop, RANK)

    def core(self, name: str, shape: Shape) -> Core:
        """Settings of a variant's engine core."""
        layers, drop = self.config["num_hidden_layers"], self.num_drop
        sizes: tuple[int, ...] = (self.units[0],)
        block = layers * self.units[0]
        if name != "stock":
            sizes = packed_block_sizes(layers - drop, drop, self.units[1])
            block = max((layers - drop) * sizes[0], drop * sizes[1])
        token = layer_token_bytes(self.config, self.size)
        return Core(
            num_blocks=self.pool // (block * token),
            block_sizes=sizes,
            max_model_len=math.ceil((shape.prompt + shape.tokens) * (1 + self.spread)) + 1,
            prefix_caching=False,
            scheduling={
                "max_num_seqs": self.max_requests,
                "max_num_batched_tokens": self.max_batched_tokens,
                "async_scheduling": self.async_scheduling,
            },
            lora_drop={} if name == "stock" else {"k": self.k, "kv": "skip", "prompts": name},
        )

    def run(self, name: str, shape: Shape, offer: Offer) -> Run:
        """One variant's run of an offer."""
        engine = Engine(self.prepared, self.core(name, shape), self.machine, self.model(name))
        return engine.serve(arrivals(shape, offer, self.spread), offer.at_once)

    def saturation(self, shape: Shape) -> float:
        """Requests per second at which stock vLLM is saturated."""
        return saturation(
            lambda size: self.run("stock", shape, Offer(size)).seconds, 2 * self.max_requests
        )

    def rounds(self, shape: Shape, offers: Sequence[Offer]) -> Rounds:
        """Runs of all variants, one per offer."""
        return {name: [self.run(name, shape, offer) for offer in offers] for name in VARIANTS}
