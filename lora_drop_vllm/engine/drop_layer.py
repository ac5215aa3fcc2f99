"""The drop layer: vLLM's own decoder layer in a full step, the low-rank update in a LoRA step.

The paper's x is the sum of the `(hidden_states, residual)` that vLLM's layers pass on; it is taken
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.utils.torch_utils import _encode_layer_name

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.kernels import ops
from lora_drop_vllm.method.reuse import REUSE, SITES, Reuse


class KeptStates(nn.Module):
    """The states c_i of L consecutive sites, as full steps fill them.

    Buffers (not in the state dict: dummy weights must not overwrite them):
        states: [L, max_requests, d]  c_i by request slot, a view of the worker's buffer
        slots: [max_tokens]  the worker's row-to-slot map
        gates: [L, d], only where the rule takes a difference
    """

    def __init__(self, rule: Reuse, states: Tensor, slots: Tensor, gates: Tensor | None) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("gates", None if gates is None else gates.to(states), persistent=False)

    def enter(self, hidden: Tensor, residual: Tensor, site: int) -> None:
        """The stream in front of a site."""
        if self.rule.difference:
            ops.save_stream(hidden, residual, self.states, site, self.slots)

    def leave(self, hidden: Tensor, residual: Tensor, site: int) -> None:
        """The stream behind a site; of differences, all are taken behind the last."""
        if not self.rule.difference:
            if self.rule.keeps_state:
                ops.save_stream(hidden, residual, self.states, site, self.slots)
        elif site == len(self.states) - 1:
            ops.save_changes(hidden, residual, self.states, self.gates, self.slots)


class DropRun(nn.Module):
    """The update of consecutive sites in a LoRA step, L sites in one call.

    Buffers:
        A, B: [L, r, d], [L, d, r]
        states: [L, max_requests, d]  c_i by request slot, a view of the worker's buffer
        slots: [max_tokens]  the worker's row-to-slot map
    """

    def __init__(
        self, config: LoRADropConfig, A: Tensor, B: Tensor, states: Tensor, slots: Tensor
    ) -> None:
        super().__init__()
        self.rule, self.scale = REUSE[config.reuse], config.scale
        self.register_buffer("A", A.to(states), persistent=False)
        self.register_buffer("B", B.to(states), persistent=False)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def update(self, x: Tensor, after: Tensor | None) -> Tensor:
        """beta * x + c_i + scale * B A x, site after site, for one row per request, [T, d].

        `after` is a token of what a compiled graph must have done before (the KV write).
        """
        rule = self.rule
        run = ops.drop_run_back if rule.writes_back else ops.drop_run
        states = self.states if rule.keeps_state else None
        return run(x, states, self.slots, self.A, self.B, self.scale, rule.beta, after)


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
    """Mixed into vLLM's decoder layer by `make_drop_layers`; knows both kinds of step.

    Attributes:
        kept: the states of the layer's sites, and of the sites around them
        sites: the layer's own places among them
        run: the update of the sites from this layer on; None where an earlier layer's covers it
        kv_proj: under `kv: write`, what LoRA steps still compute of the layer
    """

    kept: KeptStates
    sites: range
    run: DropRun | None
    kv_proj: KVProjection | None

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Full step: f^i, and the states filled at each request's last token."""
        self.kept.enter(hidden_states, residual, self.sites[0])
        hidden_states, residual = super().forward(positions, hidden_states, residual)
        self.kept.leave(hidden_states, residual, self.sites[-1])
        return hidden_states, residual

    def lora_step(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """LoRA step: no attention, no MLP.

        The first layer of a run returns the stream behind its last one as one tensor, [T, d] and
        None; the others hand on what they are given.
        """
        if self.run is None:
            return hidden_states, residual
        x = hidden_states if residual is None else hidden_states + residual
        written = None if self.kv_proj is None else self._write_kv(positions, x)
        return self.run.update(x, written), None

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


def make_drop_layers(
    layers: Sequence[Any],
    config: LoRADropConfig,
    tensors: dict[str, Tensor] | None,
    states: Tensor,
    slots: Tensor,
) -> None:
    """Turn the layers D of the built model into drop layers, in place.

    Args:
        layers: all decoder layers of vLLM's model
        config: the served settings
        tensors: the adapter's tensors, or None for B = 0 and g = 1
        states: [sites of all drop layers in their order, max_requests, d]
        slots: [max_tokens]
    """
    per_layer = len(SITES[config.injection])
    rule = REUSE[config.reuse]

    tensors = config.sites.start() if tensors is None else tensors
    filled = [site for i in config.drop_layers for site in config.sites.of_layer(i, tensors)]

    for run in _runs(config.drop_layers):
        sites = range(run.start * per_layer, run.stop * per_layer)
        own_states = states[sites.start : sites.stop]
        gates = torch.stack([filled[n].gate for n in sites]) if rule.difference else None
        kept = KeptStates(rule, own_states, slots, gates)
        for n, place in enumerate(run):
            _drop(layers[config.drop_layers[place]], kept, n, config)
        # under `kv: write` a layer's own input is needed for its K and V: no run goes through
        step = len(sites) if config.kv_skips else per_layer
        for start in range(0, len(sites), step):
            updated = sites[start : start + step]
            A, B = (torch.stack([getattr(filled[n], name) for n in updated]) for name in "AB")
            layer = layers[config.drop_layers[updated.start // per_layer]]
            layer.run = DropRun(config, A, B, states[updated.start : updated.stop], slots)


def _drop(layer: Any, kept: KeptStates, n: int, config: LoRADropConfig) -> None:
    """Turn one layer, the n-th of its run, into a drop layer."""
    names = SITES[config.injection]
    layer.__class__ = _DROP_CLASSES[type(layer)]
    layer.kept, layer.sites = kept, range(n * len(names), (n + 1) * len(names))
    layer.run, layer.kv_proj = None, None
    if len(names) == 2:
        hook = _between_sites(kept, *layer.sites)
        layer.post_attention_layernorm.register_forward_pre_hook(hook)
    if not config.kv_skips:
        _write_kv_in_lora_steps(layer)


def _runs(drop_layers: Sequence[int]) -> list[range]:
    """Places in `drop_layers`, those of neighbouring layers together."""
    runs: list[range] = []
    for place, index in enumerate(drop_layers):
        if place and drop_layers[place - 1] == index - 1:
            runs[-1] = range(runs[-1].start, place + 1)
        else:
            runs.append(range(place, place + 1))
    return runs


def _write_kv_in_lora_steps(layer: Any) -> None:
    attention = layer.self_attn
    if not hasattr(attention.attn.impl, "do_kv_cache_update"):
        raise ValueError(
            f"lora_drop.kv='write': the attention backend {attention.attn.backend.name} cannot "
            "write K and V alone; use another --attention-backend or lora_drop.kv='skip'."
        )
    layer.kv_proj = KVProjection(attention.qkv_proj, attention.q_size)
    layer.kv_layer_name = _encode_layer_name(attention.attn.layer_name)


def _between_sites(kept: KeptStates, attn: int, mlp: int) -> Any:
    """Hook before the norm behind attention: where one site ends and the next begins."""

    def save(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        if len(args) == 2:
            kept.leave(*args, attn)
            kept.enter(*args, mlp)

    return save
