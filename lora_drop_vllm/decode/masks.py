"""Attention backends of the offline model, and causal masks in the form that each backend reads.

`sdpa` is transformers' own. The public registry of transformers adds the others. `matmul` is two
matrix products and a softmax. On CPUs in bfloat16 it is twice as fast as `sdpa`, but it holds the
scores of all queries and keys. On the CPU, FlexAttention runs uncompiled and forward only.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("sdpa", "matmul", "flex", "xformers")


@dataclass(frozen=True)
class Span:
    """Positions of a batch as queries or keys.

    Attributes:
        column: [N, L] int  column in the batch; real positions of a row ascend
        sequence: [N, L] int  number of the sequence, negative for padding
    """

    column: Tensor
    sequence: Tensor

    @property
    def packed(self) -> bool:
        """True if a row holds more than one sequence."""
        other = self.sequence != self.sequence[:, :1]
        return bool((other & (self.sequence >= 0)).any())


def use_backend(model: Any, backend: str) -> None:
    """Sets the attention backend of a Hugging Face model.

    Raises:
        ValueError: the backend is unknown, or not available here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "xformers":
        way_out = "use attention='sdpa', or 'flex' for block-sparse masks"
        if importlib.util.find_spec("xformers") is None:
            raise ValueError(f"attention='xformers': not installed; install it, or {way_out}")
        if model.device.type != "cuda":
            raise ValueError(
                f"attention='xformers': runs on CUDA only, but the model is on {model.device}; "
                f"{way_out}"
            )
    from transformers import AttentionInterface

    AttentionInterface.register("lora_drop_matmul", _matmul)
    AttentionInterface.register("lora_drop_flex", _flex)
    AttentionInterface.register("lora_drop_xformers", _xformers)
    model.set_attn_implementation("sdpa" if backend == "sdpa" else f"lora_drop_{backend}")


def causal_mask(backend: str, queries: Span, keys: Span) -> Any:
    """Mask in which each query sees the keys of its own sequence up to itself.

    Args:
        queries, keys: [N, Q] and [N, K]; the same object if a span attends to itself

    Returns:
        The `attention_mask` that the backend takes.
    """
    if backend == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(n: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return _sees(
                queries.column[n, q], queries.sequence[n, q], keys.column[n, k], keys.sequence[n, k]
            )

        N, Q = queries.column.shape
        return create_block_mask(seen, N, None, Q, keys.column.shape[1], queries.column.device)
    if queries is keys:
        if backend == "xformers":
            from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

            return BlockDiagonalCausalMask.from_seqlens(_run_lengths(keys.sequence))
        if backend == "sdpa" and not keys.packed:
            return None  # the backend's own causal mask
    mask = _sees(
        queries.column[:, None, :, None],
        queries.sequence[:, None, :, None],
        keys.column[:, None, None, :],
        keys.sequence[:, None, None, :],
    )
    if backend == "matmul":
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask


def _sees(column: Tensor, sequence: Tensor, key_column: Tensor, key_sequence: Tensor) -> Tensor:
    """Mask of keys; padding sees all before it, because a query without a key has no softmax."""
    own = (key_sequence == sequence) | (sequence < 0)
    return own & (key_column <= column)


def _run_lengths(sequence: Tensor) -> list[int]:
    """Lengths of the runs of one sequence (or padding), for all rows in order."""
    begins = torch.ones_like(sequence, dtype=torch.bool)
    begins[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    at = begins.flatten().nonzero().squeeze(1)
    return at.diff(append=at.new_tensor([sequence.numel()])).tolist()


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Bias [N, heads, Q, K] of a mask [N, 1, Q, K]; xformers needs rows of a multiple of eight."""
    N, _, Q, K = mask.shape
    bias = like.new_full((N, 1, Q, -(-K // 8) * 8), float("-inf"))[..., :K]
    return bias.masked_fill_(mask, 0.0).expand(-1, like.shape[1], -1, -1)


def _per_head(module: Any, *keys_values: Tensor) -> list[Tensor]:
    """K and V, repeated for each query head."""
    return [x.repeat_interleave(module.num_key_value_groups, 1) for x in keys_values]


def _matmul(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention by matrix products, [N, heads, L, head_dim] to [N, Q, heads, head_dim].

    All query heads that share a K and V head form the rows of one product.
    """
    N, heads, Q, width = query.shape
    groups, device = key.shape[1], query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast(device, enabled=False):
        scores = (query * scaling).reshape(N, groups, -1, width) @ key.transpose(2, 3)
        scores = scores.view(N, heads, Q, -1) + attention_mask.to(scores.dtype)
        out = scores.softmax(-1).view(N, groups, -1, key.shape[2]) @ value
    return out.view(N, heads, Q, width).transpose(1, 2).contiguous(), None


def _flex(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """FlexAttention, [N, heads, L, head_dim] to [N, Q, heads, head_dim]."""
    if not query.is_cuda and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("attention='flex': has no backward on the CPU; use attention='sdpa'")
    key, value = _per_head(module, key, value)
    out = _flex_attention(query.is_cuda)(
        query, key, value, block_mask=attention_mask, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = flex_attention
    return torch.compile(attend) if compiled else attend


def _xformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """xformers' attention, [N, heads, L, head_dim] to [N, Q, heads, head_dim]."""
    from xformers.ops import memory_efficient_attention

    if isinstance(attention_mask, Tensor):
        attention_mask = _additive(attention_mask, query)
    key, value = _per_head(module, key, value)
    rows = [x.transpose(1, 2) for x in (query, key, value)]  # [N, L, heads, head_dim]
    shape = rows[0].shape
    if not isinstance(attention_mask, Tensor):  # a block-diagonal mask needs one long row
        rows = [x.flatten(0, 1)[None] for x in rows]
    out = memory_efficient_attention(*rows, attn_bias=attention_mask, scale=scaling)
    return out.view(shape), None
