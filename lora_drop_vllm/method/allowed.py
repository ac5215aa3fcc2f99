"""The method's settings and their allowed values, one row each.

Adapter folders, the server's settings and the trainer's flags all read this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.method.reuse import KV_MODES, REUSE, SITES

MAX_K = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Allowed:
    """The values that one setting may have; ask `value in allowed`, for a value of any type.

    Attributes:
        kind: the type; an integer also passes as a float, true and false never as a number
        text: what is allowed, as errors say it after "expected"
        holds: says whether a value of that type is allowed
        choices: all values, if they are few
    """

    kind: type
    text: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    @classmethod
    def one_of(cls, choices: Iterable[str]) -> Allowed:
        """The row of a setting that takes one of a few names."""
        names = tuple(choices)
        return cls(str, f"one of {', '.join(names)}", names.__contains__, names)

    def __contains__(self, value: object) -> bool:
        kinds = (int, float) if self.kind is float else self.kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind in (int, float)):
            return False
        return self.holds(value)


ALLOWED: dict[str, Allowed] = {
    "k": Allowed(
        int,
        f"an integer, 0 or more (0 switches LoRA-Drop off), at most {MAX_K}",
        lambda k: 0 <= k <= MAX_K,
    ),
    "rho": Allowed(
        float,
        "0 <= rho <= 1, the fraction of eligible layers to drop; write 0.5 for 50 %",
        lambda rho: 0 <= rho <= 1,
    ),
    "reuse": Allowed.one_of(REUSE),
    "kv": Allowed.one_of(KV_MODES),
    "injection": Allowed.one_of(SITES),
}
