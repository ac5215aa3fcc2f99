"""The closed form of one site (Sec. II-E), from sums over its rows; rows need not be kept.

At LoRA positions, x is the site's input, y the base model's output and c the reused value. The fit
first finds a gate per channel of c (`update`). Ridge regression of y - beta x - g c on x follows;
the leading right-singular directions of the fitted values cut its result to rank r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_drop_vllm.method.reuse import Reuse
from lora_drop_vllm.method.sites import Site

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean eigenvalue of the inputs' second moment


@dataclass
class Moments:
    """Sums over the rows of one site, in fp64; e = y - beta x.

    Attributes:
        xx, xe, xc: [d, d]  sums of x^T x, x^T e and x^T c
        ce, cc: [d]  sums of c e and c c, per channel
        rows: number of rows
    """

    xx: Tensor
    xe: Tensor
    xc: Tensor
    ce: Tensor
    cc: Tensor
    rows: int = 0

    @classmethod
    def zero(cls, d: int, device: torch.device) -> Moments:
        """The moments of no rows."""
        square = torch.zeros(d, d, dtype=torch.float64, device=device)
        return cls(square, square, square, square[0], square[0])

    def add(self, x: Tensor, y: Tensor, c: Tensor | None, beta: float) -> None:
        """Adds rows [M, d]; c is None if nothing is reused."""
        x = x.float()
        e = y.float() - beta * x
        self.xx = self.xx + x.T @ x
        self.xe = self.xe + x.T @ e
        if c is not None:
            c = c.float()
            self.xc = self.xc + x.T @ c
            self.ce = self.ce + (c * e).sum(0)
            self.cc = self.cc + (c * c).sum(0)
        self.rows += len(x)

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        return Moments(
            self.xx + other.xx,
            self.xe + other.xe,
            self.xc + other.xc,
            self.ce + other.ce,
            self.cc + other.cc,
            self.rows + other.rows,
        )

    def gate(self) -> Tensor:
        """The factor per channel that brings c nearest to e, [d]."""
        return self.ce / self.cc.clamp(min=1e-12)

    def targets(self, gate: Tensor) -> Tensor:
        """The sum of x^T (e - g c), [d, d]."""
        return self.xe - self.xc * gate

    def low_rank(self, gate: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """Factors P and Q of the map x -> x P Q^T, [d, r] each."""
        strength = ridge * self.xx.diagonal().mean().clamp(min=1e-12)
        penalty = strength * torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        weight = torch.linalg.solve(self.xx + penalty, self.targets(gate))
        _, vectors = torch.linalg.eigh(weight.T @ self.xx @ weight)
        directions = vectors[:, -rank:]
        return weight @ directions, directions

    def error(self, gate: Tensor, P: Tensor, Q: Tensor) -> float:
        """Squared error of the map on these rows, up to a constant."""
        return float((P * (self.xx @ P)).sum() - 2 * (P * (self.targets(gate) @ Q)).sum())


def fit_site(fitted: Moments, held_out: Moments, rule: Reuse, rank: int, scale: float) -> Site:
    """Gate, A and B of one site; held-out rows choose the ridge, then all rows are fitted."""
    both = fitted + held_out

    def gate_of(moments: Moments) -> Tensor:
        return moments.gate() if rule.difference else torch.ones_like(moments.cc)

    gate = gate_of(fitted)
    ridge = min(RIDGES, key=lambda value: held_out.error(gate, *fitted.low_rank(gate, value, rank)))
    gate = gate_of(both)
    P, Q = both.low_rank(gate, ridge, rank)
    return Site(
        P.T.float().contiguous(),
        (Q / scale).float().contiguous(),
        gate.float() if rule.difference else None,
    )
