"""What a drop layer keeps between steps: `reuse` rules, injection points, KV modes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reuse:
    """One rule for c_i in x_t^i = beta * x_t^{i-1} + c_i + scale * B_i A_i x_t^{i-1}.

    Attributes:
        beta: weight of the layer's own input
        keeps_state: whether c_i exists
        writes_back: whether a LoRA step replaces c_i by its result
        difference: whether c_i is the gated change g_i * (x_a^i - x_a^{i-1}) of the last full
            step instead of its output x_a^i
    """

    beta: float
    keeps_state: bool
    writes_back: bool
    difference: bool


REUSE: dict[str, Reuse] = {
    # Eq. 4: the layer's output one token earlier
    "previous": Reuse(beta=0.0, keeps_state=True, writes_back=True, difference=False),
    # the authors' released code: the output of the last full step
    "anchor": Reuse(beta=0.0, keeps_state=True, writes_back=False, difference=False),
    # the layer's own input plus what the layer last added to its input
    "update": Reuse(beta=1.0, keeps_state=True, writes_back=False, difference=True),
    # plain low-rank bypass
    "none": Reuse(beta=1.0, keeps_state=False, writes_back=False, difference=False),
}

# Injection points: the sites of a drop layer, each with a state and an adapter of its own, in the
# order that they run. The empty name is the whole layer.
SITES: dict[str, tuple[str, ...]] = {
    "block": ("",),
    "attn_mlp": ("attn", "mlp"),
    "attn": ("attn",),  # the layer's own MLP runs behind it
}

# The ends of each site: 0 in front of the layer, 1 between its attention and its MLP, 2 behind it.
SPANS: dict[str, tuple[int, int]] = {"": (0, 2), "attn": (0, 1), "mlp": (1, 2)}

KV_MODES: tuple[str, ...] = ("skip", "write")
