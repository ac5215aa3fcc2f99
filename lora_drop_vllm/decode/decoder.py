"""The served decode for all positions of a sequence at once, differentiable (Sec. II-B, II-E).

What trainer and evaluator run. The Hugging Face model's own modules do the work; a drop layer runs
at the full positions only, gathered into rows of their own, and the update takes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_drop_vllm.decode.batch import Batch, Tail
from lora_drop_vllm.decode.keys_values import AllPositions, Beside, Recorded
from lora_drop_vllm.decode.masks import use_backend
from lora_drop_vllm.decode.positions import Layout, Schedule, sum_since_full, take
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.kernels.reference import Update, drop_update, gated_change
from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.method.reuse import REUSE, Reuse
from lora_drop_vllm.method.sites import Site

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
    return BaseModel.of(config)


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
        """`hidden`, and the base model's own.

        Layers below the first drop layer run once. Above, the student runs at the positions that
        the adapter can change, beside the base model's keys and values of the others.
        """
        x, batch = self._stem(tokens, schedule)
        recorded = Recorded()
        with torch.no_grad():
            base = self._rest(x, batch, recorded=recorded)
        tail = Tail.of(self.model, schedule, self.adapter.config.kv, self.attention)
        if tail is None:
            return base, base
        own = self._rest(take(x, tail.at), tail.batch, adapted=True, recorded=recorded, tail=tail)
        return tail.rows.put(base, own), base

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

    def _rest(self, x: Tensor, batch: Batch, **how: Any) -> Tensor:
        """The layers from the first drop layer on, and the norm; `how` is for `_layer`."""
        recompute = self.checkpoint and torch.is_grad_enabled()
        for i in range(self._shared, self.model.config.num_hidden_layers):
            if recompute:
                x = checkpoint(self._layer, i, x, batch, use_reentrant=False, **how)
            else:
                x = self._layer(i, x, batch, **how)
        normed: Tensor = self.model.model.norm(x)
        return normed

    def _layer(
        self,
        i: int,
        x: Tensor,
        batch: Batch,
        *,
        adapted: bool = False,
        recorded: Recorded | None = None,
        tail: Tail | None = None,
    ) -> Tensor:
        """A layer of the base model, which `recorded` takes the K and V of, or of the student.

        With a tail the student attends to the recorded K and V too.
        """
        layer, config = self.model.model.layers[i], self.adapter.config
        if not adapted:
            return run_layer(layer, x, batch, recorded)
        beside = None if tail is None or recorded is None else (recorded.layers[i], tail)
        if i not in config.drop_layers:
            cache = None if beside is None else Beside(beside[0], beside[1].rows)
            return run_layer(layer, x, batch, cache)
        stream = refresh(layer, x, batch, config.kv, beside)
        return update(x, stream, batch, config, config.sites.of_layer(i, self.adapter.tensors()))


def run_layer(layer: Any, x: Tensor, batch: Batch, cache: Any = None) -> Tensor:
    """f^i at every position, [N, T, d] to [N, T, d].

    Args:
        cache: what decides on the keys and values, see `keys_values`
    """
    out: Tensor = layer(
        x, attention_mask=batch.mask, position_embeddings=batch.rope, past_key_values=cache
    )
    return out


def refresh(
    layer: Any,
    x: Tensor,
    batch: Batch,
    kv: str,
    beside: tuple[tuple[Tensor, Tensor], Tail] | None = None,
) -> list[Tensor]:
    """f^i at the full positions: the stream before, between and behind its halves.

    Under `kv: skip` they attend to each other; under `write` to the K and V that every position
    makes of its own input.

    Args:
        x: [N, T, d]
        beside: where x is a tail: the base model's K and V of this layer, and the tail

    Returns:
        [N, F, d] each.
    """
    cache: Any = None if kv == "skip" else AllPositions(layer, x, batch.rope)
    if beside is not None:
        recorded, tail = beside
        cache = Beside(recorded, tail.full_rows if cache is None else tail.rows, cache)
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
        Update(site.A.to(z.dtype), site.B.to(z.dtype), config.scale, rule.beta, writes_back=False),
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
