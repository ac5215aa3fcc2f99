"""Objects that replace a layer's KV cache; their K and V cover more positions than the queries.

An attention module passes its new K and V to `update` and attends to the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Rope(NamedTuple):
    """The rotary embedding of some positions: cos and sin, [N, L, head_dim] each, and [N, L]."""

    cos: Tensor
    sin: Tensor
    position: Tensor

    def arguments(self) -> dict[str, Any]:
        """The embedding as decoder layers and attention modules take it."""
        # only Ministral 3 reads the positions: it scales the queries by them
        return {"position_embeddings": (self.cos, self.sin), "position_ids": self.position}


class AllPositions:
    """The K and V of every position, independent of the queries' positions.

    Args:
        x: [N, T, d]  the layer's input
        rope: of every position
    """

    def __init__(self, layer: Any, x: Tensor, rope: Rope) -> None:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attn = layer.self_attn
        normed = layer.input_layernorm(x)
        heads = (*x.shape[:-1], -1, attn.head_dim)
        key, value = (project(normed).view(heads) for project in (attn.k_proj, attn.v_proj))
        if hasattr(attn, "k_norm"):  # Qwen3
            key = attn.k_norm(key)
        key, self.value = key.transpose(1, 2), value.transpose(1, 2)
        _, self.key = apply_rotary_pos_emb(key, key, rope.cos, rope.sin)

    def update(self, *_: Any) -> tuple[Tensor, Tensor]:
        """K and V of all positions, [N, kv_heads, T, head_dim] each."""
        return self.key, self.value


class Recorded:
    """The K and V of each layer that ran, kept for a second pass over some of the positions.

    Attributes:
        layers: layer number to K and V, [N, kv_heads, T, head_dim] each
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """The layer's own K and V."""
        self.layers[layer] = key, value
        return key, value


@dataclass(frozen=True)
class Places:
    """Places of the rows of a part of a batch in the whole batch.

    Attributes:
        rows: [M]  flat places in the part's [N, A], without padding
        at: [M]  flat positions in the whole [N, T]
    """

    rows: Tensor
    at: Tensor

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """`whole` [N, T, …] after the rows of `part` [N, A, …] replaced its own."""
        rows = part.flatten(0, 1).index_select(0, self.rows).to(whole.dtype)
        return whole.flatten(0, 1).index_copy(0, self.at, rows).view_as(whole)


class Beside:
    """The recorded K and V of all positions; new ones replace those of some rows.

    Args:
        recorded: K and V, [N, kv_heads, T, head_dim] each
        places: places of the new rows
        source: object that makes the new K and V, if not the queries' positions
    """

    def __init__(
        self,
        recorded: tuple[Tensor, Tensor],
        places: Places,
        source: AllPositions | None = None,
    ) -> None:
        self._recorded, self._places, self._source = recorded, places, source

    def update(self, *new: Any) -> tuple[Tensor, Tensor]:
        """K and V of all positions, [N, kv_heads, T, head_dim] each."""
        key, value = new[:2] if self._source is None else self._source.update()
        base_key, base_value = self._recorded
        return self._put(base_key, key), self._put(base_value, value)

    def _put(self, whole: Tensor, part: Tensor) -> Tensor:
        return self._places.put(whole.transpose(1, 2), part.transpose(1, 2)).transpose(1, 2)
