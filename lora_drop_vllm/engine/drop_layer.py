"""The drop layer: vLLM's own decoder layer in a full step, the low-rank update in a LoRA step.

The paper's x is the sum of the `(hidden_states, residual)` that vLLM's layers pass on; it is taken
here and nowhere else: in full steps from the norm that adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import _encode_layer_name

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.kernels import ops
from lora_drop_vllm.kernels.heuristics import row_classes
from lora_drop_vllm.method.reuse import REUSE, SPANS, Reuse
from lora_drop_vllm.method.sites import AdapterSites, Site, mlp_runs


class KeptStates(nn.Module):
    """The states c_i of L consecutive sites, which full steps fill.

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

    def take(self, x: Tensor, place: int) -> None:
        """Keeps the stream behind site `place` - 1 and in front of site `place`, [T, d].

        Differences are taken behind the last site, for all sites at once.
        """
        if self.rule.difference and place < len(self.states):
            ops.save_stream(x, self.states, place, self.slots)
        elif self.rule.difference:
            ops.save_changes(x, self.states, self.gates, self.slots)
        elif self.rule.keeps_state and place > 0:
            ops.save_stream(x, self.states, place - 1, self.slots)


class DropRun(nn.Module):
    """The update of L consecutive sites in a LoRA step, in one call.

    Buffers:
        A, B: [L, r, d], [L, d, r]
        states: [L, max_requests, d]  c_i by request slot, a view of the worker's buffer
        slots: [max_tokens]  the worker's row-to-slot map
    """

    def __init__(
        self, config: LoRADropConfig, sites: Sequence[Site], states: Tensor, slots: Tensor
    ) -> None:
        super().__init__()
        self.rule, self.scale = REUSE[config.reuse], config.scale
        A, B = torch.stack([site.A for site in sites]), torch.stack([site.B for site in sites])
        self.register_buffer("A", A.to(states), persistent=False)
        self.register_buffer("B", B.to(states), persistent=False)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def update(self, x: Tensor, after: Tensor | None) -> Tensor:
        """beta * x + c_i + scale * B A x, site after site, for one row per request, [T, d].

        A compiled graph runs first what returned `after` (the KV write).
        """
        rule = self.rule
        run = ops.drop_run_back if rule.writes_back else ops.drop_run
        states = self.states if rule.keeps_state else None
        return run(x, states, self.slots, self.A, self.B, self.scale, rule.beta, after)

    def warm_up(self) -> None:
        """Compiles the kernels for every number of rows; outside a step it touches no state."""
        layers, r, d = self.A.shape
        for rows in row_classes(layers, len(self.slots), d, r, self.A.element_size()):
            self.update(self.A.new_zeros(rows, d), None)


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


class QuantizedKV(nn.Module):
    """K and V by a quantized QKV projection, for LoRA steps under `kv: write`.

    Packed weights cannot be cut into rows, so the layer's own projection also computes Q.
    """

    def __init__(self, qkv_proj: Any, q_size: int) -> None:
        super().__init__()
        self.__dict__["qkv_proj"] = qkv_proj  # unregistered: the layer owns it
        self.q_size = q_size

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, d] to [T, 2 * kv_size]."""
        return self.qkv_proj(hidden)[0][:, self.q_size :]


class DropLayer(nn.Module):
    """A decoder layer of vLLM with a LoRA step; `make_drop_layers` exchanges the class.

    A full step is vLLM's own; the norms around the layer's sites hand on the stream (`_watch`).

    Attributes:
        kept: the states of the run of layers that this one is in
        run: the update of the sites from this layer on; None where an earlier layer's covers them
        kv_proj: under `kv: write`, what LoRA steps still compute of the attention
        mlp_runs: whether the layer's own MLP runs in LoRA steps, behind the update
    """

    kept: KeptStates
    run: DropRun | None
    kv_proj: KVProjection | QuantizedKV | None
    mlp_runs: bool

    def lora_step(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer in a LoRA step: no attention, and an MLP only where no site replaces it.

        The first layer of a run returns the stream behind the run's last layer, [T, d], and None;
        the others return what they are given. A layer whose MLP runs returns both its output and
        its input.
        """
        if self.run is None:
            return hidden_states, residual
        x = hidden_states if residual is None else hidden_states + residual
        written = None if self.kv_proj is None else self._write_kv(positions, x)
        x = self.run.update(x, written)
        if self.mlp_runs:
            return self.mlp(self.post_attention_layernorm(x)), x
        return x, None

    def _write_kv(self, positions: Tensor, x: Tensor) -> Tensor:
        """Writes K and V of this step; returns what orders the write in a compiled graph."""
        attention = self.self_attn
        kv = self.kv_proj(self.input_layernorm(x))
        key, value = kv.split([attention.kv_size, attention.kv_size], dim=-1)
        heads = (-1, attention.num_kv_heads, attention.head_dim)
        if hasattr(attention, "k_norm"):  # Qwen3
            key = attention.k_norm(key.reshape(heads)).view(key.shape)
        # the keys are passed as queries: the rotary op turns whatever heads it is given
        key, _ = attention.rotary_emb(positions, key.contiguous())
        # the name is wrapped here, inside the traced forward, as vLLM's attention does it
        name = _encode_layer_name(attention.attn.layer_name)
        return torch.ops.vllm.unified_kv_cache_update(
            key.view(heads), value.contiguous().view(heads), name
        )


@functools.cache
def _drop_class(layer_class: type[nn.Module]) -> type[DropLayer]:
    """A decoder layer of vLLM with a LoRA step."""
    return type(f"Drop{layer_class.__name__}", (DropLayer, layer_class), {})


def make_drop_layers(
    layers: Sequence[Any],
    config: LoRADropConfig,
    tensors: dict[str, Tensor] | None,
    states: Tensor,
    slots: Tensor,
) -> None:
    """Turns the layers D of the built model into drop layers, in place.

    Args:
        layers: all decoder layers of vLLM's model
        config: the served settings
        tensors: the adapter's tensors, or None for B = 0 and g = 1
        states: [sites of all drop layers in their order, max_requests, d]
        slots: [max_tokens]
    """
    sites, rule = config.sites, REUSE[config.reuse]
    tensors = sites.start() if tensors is None else tensors
    first = 0
    for run in sites.runs():
        of = [site for i in run for site in sites.of_layer(i, tensors).values()]
        own_states = states[first : first + len(of)]
        first += len(of)
        gates = torch.stack([site.gate for site in of]) if rule.difference else None
        kept = KeptStates(rule, own_states, slots, gates)
        for i in run:
            _drop(layers[i], kept, config, mlp_runs(sites.parts[i]))
        for place, norm in enumerate(_norms(layers, run, sites)):
            _watch(norm, kept, place)
        # under `kv: write` every layer needs its own input for K and V: one update per layer
        for updated in [run] if config.kv_skips else [[i] for i in run]:
            count = sum(len(sites.parts[i]) for i in updated)
            layers[updated[0]].run = DropRun(config, of[:count], own_states[:count], slots)
            of, own_states = of[count:], own_states[count:]


def _drop(layer: Any, kept: KeptStates, config: LoRADropConfig, mlp_runs: bool) -> None:
    """Turns one layer into a drop layer."""
    layer.__class__ = _drop_class(type(layer))
    layer.kept, layer.run, layer.kv_proj, layer.mlp_runs = kept, None, None, mlp_runs
    if not config.kv_skips:
        _write_kv_in_lora_steps(layer)


def _norms(layers: Sequence[Any], run: Sequence[int], sites: AdapterSites) -> list[Any]:
    """The norm in front of each site of a run of layers, and the one behind the last site."""
    spans = [(i, SPANS[part]) for i in run for part in sites.parts[i]]
    last, (_, end) = spans[-1]

    def norm(layer: int, place: int) -> Any:
        own = layers[layer]
        # the last layer never drops
        norms = own.input_layernorm, own.post_attention_layernorm, layers[layer + 1].input_layernorm
        return norms[place]

    return [norm(i, start) for i, (start, _) in spans] + [norm(last, end)]


def _watch(norm: Any, kept: KeptStates, place: int) -> None:
    """Keeps the stream that a norm returns: it adds the residual and returns the sum, too.

    The norm's input stays unread, because vLLM fuses an all-reduce only with its sole reader.
    """

    def take(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if len(args) == 2:  # in a LoRA step a norm here is given no residual
            kept.take(output[1], place)

    norm.register_forward_hook(take)


def _write_kv_in_lora_steps(layer: Any) -> None:
    attention = layer.self_attn
    if not hasattr(attention.attn.impl, "do_kv_cache_update"):
        raise ValueError(
            f"lora_drop.kv='write': the attention backend {attention.attn.backend.name} cannot "
            "write K and V alone; use another --attention-backend or lora_drop.kv='skip'."
        )
    plain = isinstance(attention.qkv_proj.quant_method, UnquantizedLinearMethod)
    layer.kv_proj = (KVProjection if plain else QuantizedKV)(attention.qkv_proj, attention.q_size)
