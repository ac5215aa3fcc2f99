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
from lora_drop_vllm.method.adapter import tensor_prefix
from lora_drop_vllm.method.reuse import REUSE, SITES, Reuse


class Site(nn.Module):
    """One injection point of a drop layer in a full step: fills its state c_i.

    Buffers (not in the state dict: dummy weights must not overwrite them):
        state: [max_requests, d]  c_i by request slot, a view of the worker's buffer
        slots: [max_tokens]  the worker's row-to-slot map
        gate: [d], only where the rule takes a difference
        next_state: [max_requests, d]  of a site that begins where this one ends, likewise
    """

    opens = True  # no other site ends where this one begins

    def __init__(self, rule: Reuse, state: Tensor, slots: Tensor, gate: Tensor | None) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("state", state, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("gate", None if gate is None else gate.to(state), persistent=False)
        self.register_buffer("next_state", None, persistent=False)

    def precede(self, following: Site) -> None:
        """Let this site's end be the beginning of another in the same launch."""
        if self.rule.difference:
            self.next_state, following.opens = following.state, False

    def enter(self, hidden: Tensor, residual: Tensor) -> None:
        """Keep the stream before the site, where the rule takes a difference."""
        if self.rule.difference and self.opens:
            ops.save_input(hidden, residual, self.state, self.slots)

    def leave(self, hidden: Tensor, residual: Tensor) -> None:
        """Fill c_i from the stream behind the site."""
        if self.next_state is not None:
            ops.save_between(hidden, residual, self.state, self.gate, self.next_state, self.slots)
        elif self.rule.keeps_state:
            ops.save_output(hidden, residual, self.state, self.slots, self.gate)


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
        sites: the layer's injection points
        run: the update of the sites from this layer on; None where an earlier layer's covers it
        kv_proj: under `kv: write`, what LoRA steps still compute of the layer
    """

    sites: nn.ModuleList
    run: DropRun | None
    kv_proj: KVProjection | None

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Full step: f^i, and the states filled at each request's last token."""
        self.sites[0].enter(hidden_states, residual)
        hidden_states, residual = super().forward(positions, hidden_states, residual)
        self.sites[-1].leave(hidden_states, residual)
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
    names = SITES[config.injection]
    before: Site | None = None
    for n, index in enumerate(config.drop_layers):
        layer = layers[index]
        layer.__class__ = _DROP_CLASSES[type(layer)]
        own = range(n * len(names), (n + 1) * len(names))
        layer.sites = nn.ModuleList(
            Site(REUSE[config.reuse], states[j], slots, _tensor("gate", config, tensors, j))
            for j in own
        )
        if index - 1 not in config.drop_layers:
            before = None
        for site in layer.sites:
            if before is not None:
                before.precede(site)
            before = site
        if len(names) == 2:
            layer.post_attention_layernorm.register_forward_pre_hook(_between_sites(*layer.sites))
        layer.run, layer.kv_proj = None, None
        if not config.kv_skips:
            _write_kv_in_lora_steps(layer)
    for run in _runs(config):
        j = slice(run[0] * len(names), (run[-1] + 1) * len(names))
        A, B = (
            torch.stack([_tensor(m, config, tensors, i) for i in range(j.start, j.stop)])
            for m in ("lora_A.weight", "lora_B.weight")
        )
        layers[config.drop_layers[run[0]]].run = DropRun(config, A, B, states[j], slots)


def _runs(config: LoRADropConfig) -> list[list[int]]:
    """Places in `drop_layers`, those together that update in one call.

    Neighbours do, unless each layer's own input is needed for its K and V.
    """
    runs: list[list[int]] = []
    for n, index in enumerate(config.drop_layers):
        if config.kv_skips and n and config.drop_layers[n - 1] == index - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
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


def _between_sites(attn: Site, mlp: Site) -> Any:
    """Hook before the norm behind attention: where one site ends and the next begins."""

    def save(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        if len(args) == 2:
            attn.leave(*args)
            mlp.enter(*args)

    return save


def _tensor(
    name: str, config: LoRADropConfig, tensors: dict[str, Tensor] | None, site: int
) -> Tensor | None:
    """An adapter tensor of the site at this place of all; None for a gate that the rule lacks."""
    d, r = config.hidden_size, config.rank
    if name == "gate" and not REUSE[config.reuse].difference:
        return None
    if tensors is None:
        shapes = {"lora_A.weight": (r, d), "lora_B.weight": (d, r), "gate": (d,)}
        return torch.full(shapes[name], float(name == "gate"))
    names = SITES[config.injection]
    layer, place = divmod(site, len(names))
    return tensors[f"{tensor_prefix(config.drop_layers[layer], names[place])}.{name}"]
