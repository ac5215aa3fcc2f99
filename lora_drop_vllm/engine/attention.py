"""Attention of a model whose drop layers keep a compacted KV list (`kv: skip`).

The layers' `Attention` modules become one of two subclasses, each with a KV-cache group of its own.
vLLM derives the lengths of the KV lists and the slots of a step from true positions. The drop
layers' metadata builder replaces both before the backend sees them. By then, RoPE has been applied
with true positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    MultipleOf,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_layout import KVCacheLayout

from lora_drop_vllm import kernels
from lora_drop_vllm.engine.kv_cache import AlwaysOnSpec, DropLayerSpec
from lora_drop_vllm.method.cost import MIN_SAVING, packed_block_sizes, packed_saving
from lora_drop_vllm.method.schedule import Row, StepKind
from lora_drop_vllm.method.state import StepState

logger = init_logger("vllm.lora_drop")

FITTING_BACKENDS = (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN)
# declare layer-outermost layouts only, but find a block by its stride
READ_STRIDES = ("CPU_ATTN",)
_BLOCK_OUTERMOST = {
    KVCacheLayout.LBNHC: KVCacheLayout.BLNHC,
    KVCacheLayout.LBHNC: KVCacheLayout.BLHNC,
}


class PackedAttention(Attention):
    """Attention of an always-on layer: all tokens, in blocks of the drop layers' bytes."""

    spec_class: type[FullAttentionSpec] = AlwaysOnSpec
    block_size: int

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """vLLM's spec of this layer with our class and block size."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec, f"{self.layer_name} is not plain full attention"
        return replace_as(spec, self.spec_class, block_size=self.block_size)


class CompactedAttention(PackedAttention):
    """Attention of a drop layer: the compacted list of the tokens of full steps."""

    spec_class = DropLayerSpec


def pack(attentions: list[Attention], drop_layers: Sequence[int], step: StepState) -> None:
    """Gives always-on and drop layers a KV-cache group each, with blocks of equally many bytes.

    Args:
        attentions: the model's attention modules by layer
        drop_layers: D
        step: the worker's step state
    """
    backend = attentions[0].get_attn_backend()
    num_drop = len(drop_layers)
    groups = len(attentions) - num_drop, num_drop
    sizes = packed_block_sizes(*groups, _block_unit(backend))
    _report(sizes, packed_saving(*groups, *sizes))
    packed = _packed(backend)
    compacted = _compacted(backend, step)
    for layer, attention in enumerate(attentions):
        drops = layer in drop_layers
        attention.__class__ = CompactedAttention if drops else PackedAttention
        attention.block_size = sizes[drops]
        attention.attn_backend = compacted if drops else packed


def _report(sizes: tuple[int, int], saving: float) -> None:
    good = saving >= MIN_SAVING
    log = logger.info if good else logger.warning
    log(
        "LoRA-Drop KV blocks: %d tokens for always-on layers, %d for drop layers; long answers "
        "save %.0f%% of what they would in blocks of a token%s",
        *sizes,
        100 * saving,
        "" if good else "; another number of drop layers packs better",
    )


def choose_backend(vllm_config: Any) -> None:
    """Names a backend that fits where the user named none and vLLM's choice does not fit.

    Called before the model is built. On Blackwell, vLLM prefers FlashInfer, which has fixed block
    sizes.
    """
    settings, model = vllm_config.attention_config, vllm_config.model_config
    if settings.backend is not None or settings.backend_per_kind:
        return

    def chosen() -> type[AttentionBackend]:
        return get_attn_backend(
            model.get_head_size(),
            model.dtype,
            vllm_config.cache_config.cache_dtype,
            num_heads=model.get_num_attention_heads(vllm_config.parallel_config),
        )

    preferred = chosen()
    if _misfit(preferred) is None:
        return
    for settings.backend in FITTING_BACKENDS:
        with suppress(ValueError):  # unavailable on this machine or for this model
            if _misfit(chosen()) is None:
                logger.info(
                    "LoRA-Drop attention backend: %s instead of vLLM's choice %s, which %s; "
                    "--attention-backend overrides this",
                    settings.backend.name,
                    preferred.get_name(),
                    _misfit(preferred),
                )
                return
    settings.backend = None  # none fits: `pack` refuses vLLM's choice


def _misfit(backend: type[AttentionBackend]) -> str | None:
    """Why a backend cannot hold packed blocks; None where it can."""
    sizes = backend.get_supported_kernel_block_sizes()
    if not any(isinstance(size, MultipleOf) for size in sizes):
        return f"supports only KV blocks of {sizes} tokens"
    if not _packed_layouts(backend):
        declared = [layout.name for layout in backend.supported_kv_cache_layouts() or ()]
        return f"supports only the KV layouts {declared}, in which a block holds one layer"
    return None


def _block_unit(backend: type[AttentionBackend]) -> int:
    """The number of tokens of which a KV block must be a multiple.

    Raises:
        ValueError: the backend cannot hold packed blocks.
    """
    if misfit := _misfit(backend):
        raise ValueError(
            f"--attention-backend {backend.get_name()}: {misfit}, but lora_drop.kv='skip' needs "
            "blocks that hold a whole group of layers, in sizes of its own; use another backend or "
            "lora_drop.kv='write'."
        )
    sizes = backend.get_supported_kernel_block_sizes()
    return next(size.base for size in sizes if isinstance(size, MultipleOf))


def _packed_layouts(backend: type[AttentionBackend]) -> tuple[KVCacheLayout, ...]:
    """The layouts in which a block holds all layers of its group, most preferred first.

    In the other layouts, all layers' pages must have one size, which pads every drop block. Tokens
    and heads have the same order inside a block as in stock vLLM.
    """
    declared = backend.supported_kv_cache_layouts()
    if declared is None:  # vLLM then takes LBNHC
        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)
    if backend.get_name() in READ_STRIDES:
        declared = tuple(_BLOCK_OUTERMOST.get(layout, layout) for layout in declared)
    return tuple(layout for layout in declared if layout in _BLOCK_OUTERMOST.values())


def _packed(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend, which declares packed layouts only."""
    layouts = _packed_layouts(backend)
    return subclass_attention_backend_with_overrides(
        "LoRADropPacked", backend, {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)}
    )


def _compacted(backend: type[AttentionBackend], step: StepState) -> type[AttentionBackend]:
    """The packed backend with our metadata builder."""
    builder = _compacted_builder(backend.get_builder_cls(), step)
    return subclass_attention_backend_with_overrides(
        "LoRADropCompacted", _packed(backend), {"get_builder_cls": staticmethod(lambda: builder)}
    )


def _compacted_builder(base: Any, step: StepState) -> Any:
    class CompactedMetadataBuilder(base):  # type: ignore[misc]
        """The backend's builder on compacted lengths and slots."""

        def __init__(self, spec: Any, layers: list[str], vllm_config: Any, device: Any) -> None:
            super().__init__(spec, layers, vllm_config, device)
            # captured graphs read the lengths from here
            size = vllm_config.scheduler_config.max_num_seqs
            self.compacted_lens = torch.zeros(size, dtype=torch.int32, device=device)
            _warm_up(device)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, **kwargs: Any) -> Any:
            if step.kind is StepKind.LORA:
                return None  # drop layers neither attend nor write
            lens = self.compacted_lens[: common_attn_metadata.num_reqs]
            common = compact(common_attn_metadata, step.rows(), self.kv_cache_spec.block_size, lens)
            return super().build(common_prefix_len, common, **kwargs)

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            if step.kind is StepKind.LORA:
                return None
            return super().build_for_cudagraph_capture(common_attn_metadata)

    return CompactedMetadataBuilder


def _warm_up(device: Any) -> None:
    """Compiles the kernel of `compact` now, not with the first request."""
    zeros = torch.zeros(2, dtype=torch.int32, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    kernels.compact_slots(zeros, zeros[:1], zeros[None, :1], slots, zeros[:1].clone(), 1)


def compact(common: Any, rows: Sequence[Row], block_size: int, seq_lens: Tensor) -> Any:
    """The common attention metadata of a full step on the compacted lists.

    Rewrites the slots in place: the operator that writes K and V takes them from that tensor, not
    from the metadata. A request may bring any number of tokens.

    Args:
        common: `CommonAttentionMetadata` in true positions
        rows: the requests in the batch's order; none outside a step (profiling, graph capture)
        block_size: tokens per block of the drop layers
        seq_lens: [num_reqs]  filled with the lengths of the compacted lists

    Returns:
        A copy with `seq_lens` and a matching `max_seq_len`.
    """
    if not rows:
        seq_lens.copy_(common.seq_lens)
        return replace(common, seq_lens=seq_lens)
    before = torch.zeros(common.num_reqs, dtype=torch.int32, pin_memory=seq_lens.is_cuda)
    before[: len(rows)] = torch.tensor([row.cache_len for row in rows], dtype=torch.int32)
    kernels.compact_slots(
        common.query_start_loc[: common.num_reqs + 1],
        before.to(seq_lens.device, non_blocking=True),
        common.block_table_tensor,
        common.slot_mapping,
        seq_lens,
        block_size,
    )
    upper = before + common.query_start_loc_cpu[: common.num_reqs + 1].diff()
    return replace(
        common,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=upper,
        _num_computed_tokens_cache=None,  # another group's, in true positions
        max_seq_len=int(upper.max()),
    )
