"""GPU attention backends on a CPU, reduced to the sizes and layouts that they declare."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

CPU = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
TRITON = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"


class FixedBlocks(CPUAttentionBackend):
    """A backend that, like FlashInfer, supports these block sizes only."""

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return [32, 64]


FIXED = f"{__name__}.FixedBlocks"


def offer(monkeypatch: pytest.MonkeyPatch, backends: dict[str | None, str]) -> None:
    """Offers the platform these backends, by name; None names its own choice."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import _cached_get_attn_backend

    def get_attn_backend_cls(cls: Any, selected: Any, *args: Any, **kwargs: Any) -> str:
        name = selected and selected.name
        if name not in backends:
            raise ValueError(f"{name} is not valid here")
        return backends[name]

    _cached_get_attn_backend.cache_clear()
    monkeypatch.setattr(
        type(current_platform), "get_attn_backend_cls", classmethod(get_attn_backend_cls)
    )
