"""vLLM's models with drop layers, and a second callable for LoRA steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from lora_drop_vllm.config import LoRADropConfig, LoRADropConfigError
from lora_drop_vllm.engine import attention
from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.drop_layer import DropLayer, make_drop_layers
from lora_drop_vllm.method.adapter import load_tensors, read_config
from lora_drop_vllm.method.schedule import StepKind
from lora_drop_vllm.method.state import StepState

LORA_STEP_TAG = "lora_step"


@support_torch_compile(dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}})
class LoRAStepModel(nn.Module):
    """The model in a LoRA step, with the weights of the full model.

    The two kinds of step need two modules, because a compiled module has one graph.
    """

    def __init__(self, *, vllm_config: VllmConfig, model: Any) -> None:
        super().__init__()
        # unregistered: the full model owns these
        self.__dict__["shared"] = (model.embed_tokens, list(model.layers), model.norm)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states [T, d] of [T] token ids, one per request."""
        embed, layers, norm = self.shared
        hidden, residual = embed(input_ids), None
        for layer in layers:
            if isinstance(layer, DropLayer):
                hidden, residual = layer.lora_step(positions, hidden, residual)
            else:
                hidden, residual = layer(positions, hidden, residual)
        hidden, _ = norm(hidden, residual)
        return hidden


class LoRADropModel(nn.Module):
    """A mixin of vLLM's `...ForCausalLM` that builds the drop layers and runs each step's kind.

    Attributes:
        lora_drop: the states and the plan of the current step
        lora_step_model: the callable of LoRA steps
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = active_config(vllm_config)
        if config.kv_skips:
            attention.choose_backend(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        scheduler = vllm_config.scheduler_config
        self.lora_drop = StepState(
            num_sites=len(config.sites.layer_of_site),
            max_requests=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            hidden_size=config.hidden_size,
            dtype=vllm_config.model_config.dtype,
            device=torch.get_default_device(),
        )
        make_drop_layers(
            self.model.layers,
            config,
            _adapter_tensors(config),
            self.lora_drop.states,
            self.lora_drop.slots,
        )
        if config.kv_skips:
            modules = [layer.self_attn.attn for layer in self.model.layers]
            attention.pack(modules, config.sites.layers, self.lora_drop)
        # vLLM looks up compiled graphs by tag and number: with one tag they would be mixed up
        with set_model_tag(LORA_STEP_TAG):
            self.lora_step_model = LoRAStepModel(vllm_config=vllm_config, model=self.model)
        self._warm = False

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Runs one engine step, of the kind that its plan says."""
        step = self.lora_drop
        if not step.in_step:
            self._warm_up(input_ids, positions)
        step.ran(step.kind)
        if step.kind is StepKind.LORA:
            return self.lora_step_model(input_ids, positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def _warm_up(self, input_ids: Tensor, positions: Tensor) -> None:
        """Compiles the LoRA step in the engine's first profiling run, not with a request."""
        if self._warm:
            return
        self._warm = True
        self.lora_step_model(input_ids, positions)
        for layer in self.model.layers:
            if isinstance(layer, DropLayer) and layer.run is not None:
                layer.run.warm_up()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the weights as vLLM does; the K/V projections of drop layers share them."""
        loaded = super().load_weights(weights)
        return loaded | {name for name, _ in self.named_parameters() if ".kv_proj." in name}

    def get_model_state_cls(self) -> type[Any]:
        """Model Runner V2's hook for a model's own state."""
        from lora_drop_vllm.engine.runner_v2 import LoRADropModelState

        return LoRADropModelState


class LoRADropLlamaForCausalLM(LoRADropModel, LlamaForCausalLM):
    """Llama with drop layers."""


class LoRADropQwen2ForCausalLM(LoRADropModel, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with drop layers."""


class LoRADropQwen3ForCausalLM(LoRADropModel, Qwen3ForCausalLM):
    """Qwen3 (dense) with drop layers."""


class LoRADropMistralForCausalLM(LoRADropModel, MistralForCausalLM):
    """Mistral and Ministral 3 with drop layers."""


def _adapter_tensors(config: LoRADropConfig) -> dict[str, Tensor] | None:
    """The tensors of the adapter; each worker reads them itself.

    Raises:
        LoRADropConfigError: the folder holds another adapter than when the server started.
    """
    if config.adapter is None:
        return None
    folder = Path(config.adapter)
    adapter = read_config(folder)
    has = adapter.r, adapter.scale, adapter.injection
    if has != (config.rank, config.scale, config.injection):
        raise LoRADropConfigError(
            f"lora_drop.adapter={config.adapter!r}: was replaced by another adapter while the "
            "server started; start it again."
        )
    return load_tensors(folder, adapter)
