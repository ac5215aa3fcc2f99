"""The drop layer: vLLM's own decoder layer in a full step, the low-rank update in a LoRA step.

The paper's x is the sum of the `(hidden_states, residual)` that vLLM's layers pass on; it is taken
here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.utils.torch_utils import _encode_layer_name

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.kernels import ops
from lora_drop_vllm.method.adapter import tensor_prefix
from lora_drop_vllm.method.reuse import REUSE, SITES, Reuse


class Site(nn.Module):
    """One injection point of a drop layer: its adapter and its state.

    Buffers (not in the state dict: dummy weights must not overwrite them):
        A, B: [r, d], [d, r]
        gate: [d], only where the rule takes a difference
        state: [max_requests, d]  c_i by request slot, a view of the worker's buffer
        slots: [max_tokens]  the worker's row-to-slot map
    """

    def __init__(
        self, rule: Reuse, scale: float, tensors: dict[str, Tensor], state: Tensor, slots: Tensor
    ) -> None:
        super().__init__()
        self.rule, self.scale = rule, scale
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(state), persistent=False)
        if "gate" not in tensors:
            self.gate = None
        self.register_buffer("state", state, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def save_input(self, hidden: Tensor, residual: Tensor) -> None:
        """Keep the stream before the site, where the rule takes a difference."""
        if self.rule.difference:
            ops.save_input(hidden, residual, self.state, self.slots)

    def save_output(self, hidden: Tensor, residual: Tensor) -> None:
        """Fill c_i from the stream behind the site."""
        if self.rule.keeps_state:
            ops.save_output(hidden, residual, self.state, self.slots, self.gate)

    def update(self, x: Tensor, after: Tensor | None) -> Tensor:
        """beta * x + c_i + scale * B A x for one row per request, [T, d] to [T, d].

        `after` is a token of what a compiled graph must have done before (the KV write).
        """
        rule = self.rule
        run = ops.drop_update_back if rule.writes_back else ops.drop_update
        state = self.state if rule.keeps_state else None
        return run(x, state, self.slots, self.A, self.B, self.scale, rule.beta, after)


class KVProjection(nn.Module):
    """The K and V rows of a layer's fused QKV projection, for LoRA steps under `kv: write`.

    Shares the storage of the fused weight until the backend packs its own copy (CPU).
    """

    def __init__(self, qkv_proj: Any, q_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(qkv_proj.weight.data[q_size:], requires_grad=False)
        bias = qkv_proj.bias
        self.bias = None if bias is None else nn.Parameter(bias.data[q_size:], requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, d] to [T, 2 * kv_size]."""
        return self.quant_method.apply(self, hidden, self.bias)


class DropLayer(nn.Module):
    """Mixed into vLLM's decoder layer by `become_drop_layer`; knows both kinds of step."""

    sites: nn.ModuleList
    kv_proj: KVProjection | None

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Full step: f^i, and the states filled at each request's last token."""
        self.sites[0].save_input(hidden_states, residual)
        hidden_states, residual = super().forward(positions, hidden_states, residual)
        self.sites[-1].save_output(hidden_states, residual)
        return hidden_states, residual

    def lora_step(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> Tensor:
        """LoRA step: no attention, no MLP; returns x_t^i [T, d] as one tensor."""
        x = hidden_states if residual is None else hidden_states + residual
        written = None if self.kv_proj is None else self._write_kv(positions, x)
        for site in self.sites:
            x = site.update(x, written)
        return x

    def _write_kv(self, positions: Tensor, x: Tensor) -> Tensor:
        """Write K and V of this step; returns the engine's token that orders the write."""
        attention = self.self_attn
        kv = self.kv_proj(self.input_layernorm(x))
        key, value = kv.split([attention.kv_size, attention.kv_size], dim=-1)
        # to the rotary op the keys are its queries: it turns whatever heads it is given
        key, _ = attention.rotary_emb(positions, key.contiguous())
        heads = (-1, attention.num_kv_heads, attention.head_dim)
        return torch.ops.vllm.unified_kv_cache_update(
            key.view(heads), value.contiguous().view(heads), self.kv_layer_name
        )


class DropLlamaDecoderLayer(DropLayer, LlamaDecoderLayer):
    """Llama's decoder layer with a LoRA step."""


class DropQwen2DecoderLayer(DropLayer, Qwen2DecoderLayer):
    """Qwen2's decoder layer with a LoRA step."""


_DROP_CLASSES: dict[type[nn.Module], type[DropLayer]] = {
    LlamaDecoderLayer: DropLlamaDecoderLayer,
    Qwen2DecoderLayer: DropQwen2DecoderLayer,
}


def become_drop_layer(
    layer: Any,
    index: int,
    config: LoRADropConfig,
    tensors: dict[str, Tensor] | None,
    states: Tensor,
    slots: Tensor,
) -> None:
    """Turn a decoder layer of the built model into a drop layer, in place.

    Args:
        layer: vLLM's decoder layer
        index: i
        config: the served settings
        tensors: the adapter's tensors, or None for B = 0 and g = 1
        states: [sites of a layer, max_requests, d]
        slots: [max_tokens]
    """
    layer.__class__ = _DROP_CLASSES[type(layer)]
    rule = REUSE[config.reuse]
    names = SITES[config.injection]
    layer.sites = nn.ModuleList(
        Site(rule, config.scale, _site_tensors(config, tensors, index, name), state, slots)
        for name, state in zip(names, states, strict=True)
    )
    if len(names) == 2:
        layer.post_attention_layernorm.register_forward_pre_hook(_between_sites(*layer.sites))
    attention = layer.self_attn
    if not config.kv_skips and not hasattr(attention.attn.impl, "do_kv_cache_update"):
        raise ValueError(
            f"lora_drop.kv='write': the attention backend {attention.attn.backend.name} cannot "
            "write K and V alone; use another --attention-backend or lora_drop.kv='skip'."
        )
    layer.kv_proj = None if config.kv_skips else KVProjection(attention.qkv_proj, attention.q_size)
    layer.kv_layer_name = _encode_layer_name(attention.attn.layer_name)


def _between_sites(attn: Site, mlp: Site) -> Any:
    """Hook before the norm behind attention: where one site ends and the next begins."""

    def save(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        if len(args) == 2:
            attn.save_output(*args)
            mlp.save_input(*args)

    return save


def _site_tensors(
    config: LoRADropConfig, tensors: dict[str, Tensor] | None, index: int, site: str
) -> dict[str, Tensor]:
    d, r = config.hidden_size, config.rank
    difference = REUSE[config.reuse].difference
    if tensors is None:
        made = {"A": torch.zeros(r, d), "B": torch.zeros(d, r)}
        return made | ({"gate": torch.ones(d)} if difference else {})
    prefix = tensor_prefix(index, site)
    read = {
        "A": tensors[f"{prefix}.lora_A.weight"].contiguous(),
        "B": tensors[f"{prefix}.lora_B.weight"].contiguous(),
    }
    return read | ({"gate": tensors[f"{prefix}.gate"]} if difference else {})
