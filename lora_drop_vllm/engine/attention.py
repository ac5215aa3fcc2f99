"""Attention of a model whose drop layers keep a compacted KV list (`kv: skip`).

The layers' `Attention` modules become one of two subclasses that ask for KV-cache groups of their
own. The drop layers' metadata builder then replaces, before the backend sees them, what vLLM
derives from true positions: the lengths of the KV lists and the slots that a step writes. RoPE has
been applied with true positions by then.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_layout import KVCacheLayout

from lora_drop_vllm import kernels
from lora_drop_vllm.engine.kv_cache import AlwaysOnSpec, DropLayerSpec
from lora_drop_vllm.method.cost import MAX_WASTE, packed_block_sizes, packing_waste
from lora_drop_vllm.method.schedule import Row, StepKind
from lora_drop_vllm.method.state import StepState

logger = init_logger("vllm.lora_drop")


class PackedAttention(Attention):
    """Attention of an always-on layer: all tokens, blocks as heavy as the drop layers'."""

    spec_class: type[FullAttentionSpec] = AlwaysOnSpec
    block_size: int

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """vLLM's spec of this layer, with our class and block size."""
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec, f"{self.layer_name} is not plain full attention"
        return replace_as(spec, self.spec_class, block_size=self.block_size)


class CompactedAttention(PackedAttention):
    """Attention of a drop layer: the compacted list of the tokens of full steps."""

    spec_class = DropLayerSpec


def pack(attentions: list[Attention], drop_layers: tuple[int, ...], step: StepState) -> None:
    """Give always-on and drop layers KV-cache groups of their own, with blocks of equal weight.

    Args:
        attentions: the model's attention modules by layer
        drop_layers: D
        step: the worker's step state
    """
    backend = attentions[0].get_attn_backend()
    num_drop = len(drop_layers)
    sizes = packed_block_sizes(len(attentions) - num_drop, num_drop, _block_unit(backend))
    _report(sizes, packing_waste(len(attentions) - num_drop, num_drop, *sizes))
    packed = _packed(backend)
    compacted = _compacted(backend, step)
    for layer, attention in enumerate(attentions):
        drops = layer in drop_layers
        attention.__class__ = CompactedAttention if drops else PackedAttention
        attention.block_size = sizes[drops]
        attention.attn_backend = compacted if drops else packed


def _report(sizes: tuple[int, int], waste: float) -> None:
    log = logger.info if waste <= MAX_WASTE else logger.warning
    log(
        "LoRA-Drop KV blocks: %d tokens for always-on layers, %d for drop layers; at most %.1f%% "
        "of a pool block stays unused%s",
        *sizes,
        100 * waste,
        "" if waste <= MAX_WASTE else "; another number of drop layers packs better",
    )


def _block_unit(backend: type[AttentionBackend]) -> int:
    """The number of tokens that a KV block must be a multiple of."""
    sizes = backend.get_supported_kernel_block_sizes()
    for size in sizes:
        if isinstance(size, MultipleOf):
            return size.base
    raise ValueError(
        f"--attention-backend {backend.get_name()}: supports only KV blocks of {sizes} tokens, but "
        "lora_drop.kv='skip' needs blocks of other sizes; use another backend or "
        "lora_drop.kv='write'."
    )


def _packed(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend, declared for layouts in which a block holds all layers of its group.

    In the other layouts all layers' pages must have one size, which pads every drop block.
    """
    wanted = (KVCacheLayout.BLHNC, KVCacheLayout.BLNHC)
    declared = backend.supported_kv_cache_layouts()
    # a backend reads the inside of a block, [H, N, C], in one order; where the block starts is
    # a stride to it, so declaring the layer-outermost order is enough
    inner = {layout.layer_view_order[1:] for layout in declared or wanted}
    layouts = tuple(w for w in wanted if w.layer_view_order[1:] in inner)
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
        """The backend's builder, fed with the compacted lengths and slots."""

        def __init__(self, spec: Any, layers: list[str], vllm_config: Any, device: Any) -> None:
            super().__init__(spec, layers, vllm_config, device)
            # captured graphs read the lengths from here
            size = vllm_config.scheduler_config.max_num_seqs
            self.compacted_lens = torch.zeros(size, dtype=torch.int32, device=device)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, **kwargs: Any) -> Any:
            if step.kind is StepKind.LORA:
                return None  # nothing of D attends, nothing is written
            lens = self.compacted_lens[: common_attn_metadata.num_reqs]
            common = compact(common_attn_metadata, step.rows(), self.kv_cache_spec.block_size, lens)
            return super().build(common_prefix_len, common, **kwargs)

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            if step.kind is StepKind.LORA:
                return None
            return super().build_for_cudagraph_capture(common_attn_metadata)

    return CompactedMetadataBuilder


def compact(common: Any, rows: Sequence[Row], block_size: int, seq_lens: Tensor) -> Any:
    """Common attention metadata of a full step, on the compacted lists.

    The slots are rewritten in place: the operator that writes K and V takes them from that
    tensor, not from the metadata. A request may bring any number of tokens.

    Args:
        common: `CommonAttentionMetadata` in true positions
        rows: the batch's requests in its order; none outside a step (profiling, graph capture)
        block_size: tokens per block of the drop layers
        seq_lens: [num_reqs]  filled with the lengths of the compacted lists

    Returns:
        A copy with `seq_lens`, and `max_seq_len` to match.
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
        max_seq_len=int(upper.max()),
    )
