"""The served decode for all positions of a sequence at once, differentiable (Sec. II-B, II-E).

What trainer and evaluator run. The Hugging Face model's own modules do the work; a drop layer runs
at the full positions only, gathered into rows of their own, and the update takes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_drop_vllm.decode.masks import Span, causal_mask, use_backend
from lora_drop_vllm.decode.positions import Layout, Schedule, sum_since_full, take
from lora_drop_vllm.decode.trainable import Adapter, Site, sites
from lora_drop_vllm.kernels.reference import drop_update, gated_change
from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.method.reuse import REUSE, Reuse

FAMILIES = ("llama", "qwen2")
TOKENS_AT_ONCE = 2048  # of a batch, where no gradient is wanted


def base_model(model: Any) -> BaseModel:
    """What an adapter for a Hugging Face model must agree on.

    Raises:
        ValueError: a model of another family, or one with sliding-window attention.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r}: LoRA-Drop knows {' and '.join(FAMILIES)}; use a "
            "model of one of them"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "use_sliding_window=True: layers with sliding-window attention are not supported; use "
            "a model without them"
        )
    return BaseModel(config.model_type, config.num_hidden_layers, config.hidden_size)


@dataclass(frozen=True)
class Batch:
    """One batch as the layers need it; see `Schedule` and `Layout`.

    Attributes:
        rope, full_rope: cos and sin, [N, T, head_dim] and of the full positions [N, F, head_dim]
        mask: of layers outside D
        drop_mask: of layers in D; queries are the full positions
    """

    layout: Layout
    rope: tuple[Tensor, Tensor]
    full_rope: tuple[Tensor, Tensor]
    mask: Any
    drop_mask: Any

    @classmethod
    def of(cls, model: Any, schedule: Schedule, kv: str, attention: str = "sdpa") -> Batch:
        """A batch for one model, KV mode and attention backend."""
        layout = Layout.of(schedule)
        rope = model.model.rotary_emb(model.model.embed_tokens.weight, schedule.position)
        cos, sin = (take(part, layout.full_at) for part in rope)
        T = schedule.full.shape[1]
        column = torch.arange(T, device=schedule.full.device).expand_as(schedule.full)
        everything = Span(column, schedule.sequence)
        number = schedule.sequence.flatten()[layout.full_at].where(layout.real, -1)
        full = Span(layout.full_at % T, number)
        return cls(
            layout,
            rope,
            (cos, sin),
            causal_mask(attention, everything, everything),
            causal_mask(attention, full, full if kv == "skip" else everything),
        )


class ForcedDecoder:
    """A Hugging Face Llama or Qwen2 model under LoRA-Drop.

    The model is put into evaluation mode, frozen and told to attend with the backend; only the
    adapter's parameters get gradients.

    Args:
        model: `LlamaForCausalLM` or `Qwen2ForCausalLM`
        adapter: made for that model
        attention: `sdpa`, `flex` or `xformers`
        checkpoint: recompute each layer in the backward pass instead of keeping its activations

    Raises:
        ValueError: another family, an adapter for another model, a backend not to be had here.
    """

    def __init__(
        self, model: Any, adapter: Adapter, *, attention: str = "sdpa", checkpoint: bool = False
    ) -> None:
        base = base_model(model)
        if adapter.config.base_model != base:
            raise ValueError(
                f"adapter for {adapter.config.base_model}: the model is {base}; use the adapter of "
                "this model"
            )
        use_backend(model, attention)
        self.model = model.eval().requires_grad_(False)
        self.adapter = adapter
        self.attention, self.checkpoint = attention, checkpoint
        self._shared = min(adapter.config.drop_layers, default=base.num_hidden_layers)

    def hidden(self, tokens: Tensor, schedule: Schedule) -> Tensor:
        """The normed stream [N, T, d] that `logits` reads, for token ids [N, T].

        At padding it holds no meaning.
        """
        x, batch = self._stem(tokens, schedule)
        return self._rest(x, batch, adapted=True)

    def hidden_and_base(self, tokens: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """`hidden`, and the base model's own; layers below the first drop layer run once."""
        x, batch = self._stem(tokens, schedule)
        with torch.no_grad():
            base = self._rest(x, batch, adapted=False)
        return self._rest(x, batch, adapted=True), base

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] to [..., vocabulary]."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def logits_transposed(self, slope: Tensor) -> Tensor:
        """The gradient by `hidden` out of that by the logits: [..., vocabulary] to [..., d]."""
        by_hidden: Tensor = slope @ self.model.lm_head.weight
        return by_hidden

    @torch.no_grad()
    def _stem(self, tokens: Tensor, schedule: Schedule) -> tuple[Tensor, Batch]:
        if tokens.shape != schedule.full.shape:
            raise ValueError(
                f"tokens of shape {list(tokens.shape)}: the schedule is for "
                f"{list(schedule.full.shape)}; make both from the same batch"
            )
        batch = Batch.of(self.model, schedule, self.adapter.config.kv, self.attention)
        x = self.model.model.embed_tokens(tokens)
        for layer in self.model.model.layers[: self._shared]:
            x = run_layer(layer, x, batch)
        return x, batch

    def _rest(self, x: Tensor, batch: Batch, adapted: bool) -> Tensor:
        recompute = self.checkpoint and torch.is_grad_enabled()
        for i in range(self._shared, self.model.config.num_hidden_layers):
            if recompute:
                x = checkpoint(self._layer, i, x, batch, adapted, use_reentrant=False)
            else:
                x = self._layer(i, x, batch, adapted)
        normed: Tensor = self.model.model.norm(x)
        return normed

    def _layer(self, i: int, x: Tensor, batch: Batch, adapted: bool) -> Tensor:
        layer, config = self.model.model.layers[i], self.adapter.config
        if not adapted or i not in config.drop_layers:
            return run_layer(layer, x, batch)
        stream = refresh(layer, x, batch, config.kv)
        return update(x, stream, batch, config, sites(config, i, self.adapter.tensors()))


def run_layer(layer: Any, x: Tensor, batch: Batch) -> Tensor:
    """f^i at every position, [N, T, d] to [N, T, d]."""
    out: Tensor = layer(x, attention_mask=batch.mask, position_embeddings=batch.rope)
    return out


def refresh(layer: Any, x: Tensor, batch: Batch, kv: str) -> list[Tensor]:
    """f^i at the full positions: the stream before, between and behind its halves.

    Under `kv: skip` they attend to each other; under `write` to the K and V that every position
    makes of its own input.

    Args:
        x: [N, T, d]

    Returns:
        [N, F, d] each.
    """
    cache = None if kv == "skip" else _AllPositions(layer, x, batch.rope)
    return _halves(layer, take(x, batch.layout.full_at), batch.full_rope, batch.drop_mask, cache)


def halves(layer: Any, x: Tensor, batch: Batch) -> list[Tensor]:
    """f^i at every position: the stream before, between and behind its halves, [N, T, d] each."""
    return _halves(layer, x, batch.rope, batch.mask, None)


def _halves(layer: Any, before: Tensor, rope: Any, mask: Any, cache: Any) -> list[Tensor]:
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(before),
        position_embeddings=rope,
        attention_mask=mask,
        past_key_values=cache,
    )
    middle = before + attended
    return [before, middle, middle + layer.mlp(layer.post_attention_layernorm(middle))]


def update(
    x: Tensor, stream: list[Tensor], batch: Batch, config: AdapterConfig, of: Sequence[Site]
) -> Tensor:
    """Fill in the LoRA positions: x_t^i = beta x_t^{i-1} + c_i + s B_i A_i x_t^{i-1} (Eq. 4).

    Args:
        x: [N, T, d]  the layer's input
        stream: [N, F, d] each  from `refresh`

    Returns:
        [N, T, d]  the layer's output.
    """
    layout = batch.layout
    z = take(x, layout.lora_at)
    for site, (before, after) in zip(of, pairwise(ends(stream, config))):
        z = through(site, z, before, after, layout, config)
    result = torch.cat((stream[-1].flatten(0, 1), z)).index_select(0, layout.source)
    return result.view_as(x)


def ends(stream: list[Tensor], config: AdapterConfig) -> list[Tensor]:
    """The stream at the ends of a layer's sites, out of that at the ends of its halves."""
    return stream if config.injection == "attn_mlp" else stream[::2]


def through(
    site: Site, z: Tensor, before: Tensor, after: Tensor, layout: Layout, config: AdapterConfig
) -> Tensor:
    """The LoRA positions' rows behind a site.

    Args:
        z: [M, d]  before it
        before, after: [N, F, d]  the full positions' rows on both sides
    """
    rule = REUSE[config.reuse]
    state = kept(before, after, rule, site.gate)
    return drop_update(
        regressor(z, layout, rule),
        None if state is None else state.flatten(0, 1),
        layout.slots,
        site.A.to(z.dtype),
        site.B.to(z.dtype),
        config.scale,
        rule.beta,
        writes_back=False,
    ).to(z.dtype)


def kept(before: Tensor, after: Tensor, rule: Reuse, gate: Tensor | None) -> Tensor | None:
    """c_i after a full step, at every position given, or None where the rule keeps nothing.

    Args:
        before, after: [..., d]  the stream on both sides of a site
        gate: [d], or None: g = 1
    """
    if not rule.keeps_state:
        return None
    if not rule.difference:
        return after
    gate = after.new_ones(after.shape[-1]) if gate is None else gate.to(after.dtype)
    change: Tensor = gated_change(before, after, gate)
    return change.to(after.dtype)


def regressor(z: Tensor, layout: Layout, rule: Reuse) -> Tensor:
    """What A reads in place of a site's inputs z [M, d], so that c_i is always a full step's.

    x_t = x_{t-1} + s B A z_t (`previous`) unrolls to x_t = x_a + s B A (z_{a+1} + ... + z_t).
    """
    return sum_since_full(z, layout) if rule.writes_back else z


class _AllPositions:
    """Stands where a layer keeps its KV cache, and answers with the K and V of all positions."""

    def __init__(self, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attn = layer.self_attn
        normed = layer.input_layernorm(x)
        heads = (*x.shape[:-1], -1, attn.head_dim)
        key, self.value = (
            project(normed).view(heads).transpose(1, 2) for project in (attn.k_proj, attn.v_proj)
        )
        _, self.key = apply_rotary_pos_emb(key, key, *rope)

    def update(self, *_: Any) -> tuple[Tensor, Tensor]:
        """[N, kv_heads, T, head_dim] each, whatever the queries brought."""
        return self.key, self.value
