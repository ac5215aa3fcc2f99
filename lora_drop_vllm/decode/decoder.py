"""The served decode for all positions of a sequence at once, differentiable (Sec. II-B, II-E).

The trainer and the evaluator run it. The Hugging Face model's own modules do the work. A drop layer
runs at the full positions only, gathered into rows of their own. The update fills in the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_drop_vllm.decode.batch import Batch, Tail
from lora_drop_vllm.decode.keys_values import AllPositions, Beside, Recorded, Rope
from lora_drop_vllm.decode.masks import use_backend
from lora_drop_vllm.decode.positions import Layout, Schedule, sum_since_full, take
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.families import FAMILIES
from lora_drop_vllm.kernels.reference import Update, drop_update, gated_change
from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.method.reuse import REUSE, SPANS, Reuse
from lora_drop_vllm.method.sites import Site, mlp_runs

TOKENS_AT_ONCE = 2048  # per batch, if no gradient is needed


def base_model(model: Any) -> BaseModel:
    """The properties of a Hugging Face model that its adapter must match.

    Raises:
        ValueError: the model has another family or sliding-window attention.
    """
    config = model.config
    supported = [family.model_type for family in FAMILIES]
    if config.model_type not in supported:
        raise ValueError(
            f"model_type={config.model_type!r}: LoRA-Drop supports {', '.join(supported)}; use "
            "one of these models"
        )
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise ValueError(
            f"sliding_window={window}: layers with sliding-window attention are not supported; use "
            "a model without them"
        )
    return BaseModel.of(config)


class ForcedDecoder:
    """A Hugging Face model of one of the families in `families.py` under LoRA-Drop.

    The constructor freezes the model, puts it into evaluation mode and sets its attention backend.
    Only the adapter's parameters get gradients.

    Args:
        model: `LlamaForCausalLM`, `Qwen2ForCausalLM` and so on
        adapter: an adapter for that model
        attention: `sdpa`, `flex` or `xformers`
        checkpoint: recompute each layer in the backward pass instead of keeping its activations

    Raises:
        ValueError: the model has another family, the adapter is for another model, or the backend
            is not available here.
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
        self._shared = min(adapter.config.sites.layers, default=base.num_hidden_layers)

    def hidden(self, tokens: Tensor, schedule: Schedule) -> Tensor:
        """The normed stream [N, T, d] that `logits` reads, for token ids [N, T].

        Values at padding have no meaning.
        """
        x, batch = self._stem(tokens, schedule)
        return self._rest(x, batch, adapted=True)

    def hidden_and_base(self, tokens: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """`hidden`, and the same stream of the base model.

        Layers below the first drop layer run once. From there on, the student runs only at the
        positions that the adapter can change. It reads the base model's keys and values elsewhere.
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
        """Logits of the normed stream, [..., d] to [..., vocabulary]."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def logits_transposed(self, slope: Tensor) -> Tensor:
        """The gradient by `hidden`, from that by the logits, [..., vocabulary] to [..., d]."""
        by_hidden: Tensor = slope @ self.model.lm_head.weight
        return by_hidden

    @torch.no_grad()
    def _stem(self, tokens: Tensor, schedule: Schedule) -> tuple[Tensor, Batch]:
        if tokens.shape != schedule.full.shape:
            raise ValueError(
                f"tokens of shape {list(tokens.shape)}: the schedule has shape "
                f"{list(schedule.full.shape)}; make both from the same batch"
            )
        batch = Batch.of(self.model, schedule, self.adapter.config.kv, self.attention)
        x = self.model.model.embed_tokens(tokens)
        for layer in self.model.model.layers[: self._shared]:
            x = run_layer(layer, x, batch)
        return x, batch

    def _rest(self, x: Tensor, batch: Batch, **how: Any) -> Tensor:
        """The layers from the first drop layer on, and the norm; `how` goes to `_layer`."""
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
        """One layer of the base model or of the student; `recorded` keeps the base model's K and V.

        With a tail, the student also attends to the recorded K and V.
        """
        layer, config = self.model.model.layers[i], self.adapter.config
        if not adapted:
            return run_layer(layer, x, batch, recorded)
        beside = None if tail is None or recorded is None else (recorded.layers[i], tail)
        if i not in config.sites.parts:
            cache = None if beside is None else Beside(beside[0], beside[1].rows)
            return run_layer(layer, x, batch, cache)
        stream = refresh(layer, x, batch, config.kv, beside)
        of = config.sites.of_layer(i, self.adapter.tensors())
        return update(layer, x, stream, batch, config, of)


def run_layer(layer: Any, x: Tensor, batch: Batch, cache: Any = None) -> Tensor:
    """f^i at every position, [N, T, d] to [N, T, d].

    Args:
        cache: object that supplies the keys and values; see `keys_values`
    """
    out: Tensor = layer(
        x, attention_mask=batch.mask, past_key_values=cache, **batch.rope.arguments()
    )
    return out


def refresh(
    layer: Any,
    x: Tensor,
    batch: Batch,
    kv: str,
    beside: tuple[tuple[Tensor, Tensor], Tail] | None = None,
) -> list[Tensor]:
    """f^i at the full positions: the stream before, between and after its halves.

    Under `kv: skip`, full positions attend to each other. Under `write`, they attend to the K and V
    that every position makes from its own input.

    Args:
        x: [N, T, d]
        beside: the base model's K and V of this layer, and the tail, if x is a tail

    Returns:
        [N, F, d] each.
    """
    cache: Any = None if kv == "skip" else AllPositions(layer, x, batch.rope)
    if beside is not None:
        recorded, tail = beside
        cache = Beside(recorded, tail.full_rows if cache is None else tail.rows, cache)
    return _halves(layer, take(x, batch.layout.full_at), batch.full_rope, batch.drop_mask, cache)


def halves(layer: Any, x: Tensor, batch: Batch) -> list[Tensor]:
    """f^i at every position: the stream before, between and after its halves, [N, T, d] each."""
    return _halves(layer, x, batch.rope, batch.mask, None)


def _halves(layer: Any, before: Tensor, rope: Rope, mask: Any, cache: Any) -> list[Tensor]:
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(before),
        attention_mask=mask,
        past_key_values=cache,
        **rope.arguments(),
    )
    middle = before + attended
    return [before, middle, _add_mlp(layer, middle)]


def _add_mlp(layer: Any, middle: Tensor) -> Tensor:
    added: Tensor = middle + layer.mlp(layer.post_attention_layernorm(middle))
    return added


def update(
    layer: Any,
    x: Tensor,
    stream: list[Tensor],
    batch: Batch,
    config: AdapterConfig,
    of: Mapping[str, Site],
) -> Tensor:
    """Fills in the LoRA positions: x_t^i = beta x_t^{i-1} + c_i + s B_i A_i x_t^{i-1} (Eq. 4).

    Args:
        x: [N, T, d]  the layer's input
        stream: [N, F, d] each  from `refresh`
        of: the sites of the layer in the order that they run

    Returns:
        [N, T, d]  the layer's output.
    """
    layout = batch.layout
    z = take(x, layout.lora_at)
    for part, site in of.items():
        z = through(site, z, *ends(stream, part), layout, config)
    if mlp_runs(of):
        z = _add_mlp(layer, z)
    result = torch.cat((stream[-1].flatten(0, 1), z)).index_select(0, layout.source)
    return result.view_as(x)


def ends(stream: list[Tensor], part: str) -> tuple[Tensor, Tensor]:
    """The stream at the ends of a site, from the stream at the ends of the layer's halves."""
    start, end = SPANS[part]
    return stream[start], stream[end]


def through(
    site: Site, z: Tensor, before: Tensor, after: Tensor, layout: Layout, config: AdapterConfig
) -> Tensor:
    """The LoRA positions' rows after a site.

    Args:
        z: [M, d]  the rows before it
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
    """c_i after a full step, at every given position, or None if the rule keeps nothing.

    Args:
        before, after: [..., d]  the stream on both sides of a site
        gate: [d], or None for g = 1
    """
    if not rule.keeps_state:
        return None
    if not rule.difference:
        return after
    gate = after.new_ones(after.shape[-1]) if gate is None else gate.to(after.dtype)
    change: Tensor = gated_change(before, after, gate)
    return change.to(after.dtype)


def regressor(z: Tensor, layout: Layout, rule: Reuse) -> Tensor:
    """The input of A that replaces a site's inputs z [M, d]; c_i then always is a full step's.

    x_t = x_{t-1} + s B A z_t (`previous`) unrolls to x_t = x_a + s B A (z_{a+1} + ... + z_t).
    """
    return sum_since_full(z, layout) if rule.writes_back else z
