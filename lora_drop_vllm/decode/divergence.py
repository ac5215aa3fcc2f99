"""The distance between two next-token distributions."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(log_p: Tensor, base_log_p: Tensor) -> Tensor:
    """KL(base || this) in nats, from [R, V] each to [R]."""
    return (base_log_p.exp() * (base_log_p - log_p)).sum(-1)
