"""Checks of a request's own settings, before the request is queued.

Refused are a bad `lora_drop_k` or `lora_drop_steps` in `vllm_xargs`, and prompts that continue
after an answer (the Python API's streaming input): an answer's tokens from LoRA steps have no KV in
the drop layers.

Patches `InputProcessor.process_inputs`. Reason: there vLLM turns bad parameters into an HTTP 400 of
the server and an error of the Python API alike. Its plugin point for extra arguments is a logits
processor, which would slow down every step. Removal condition: vLLM lets a plugin validate requests
without a logits processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from lora_drop_vllm.config import MODEL_IMPL, SETTINGS, LoRADropConfig
from lora_drop_vllm.engine import step_kinds
from lora_drop_vllm.method.adapter_folder import shown

ARGUMENT = "lora_drop_k"


def request_k(extra_args: Mapping[str, Any] | None, served_k: int, least: int | None = 0) -> int:
    """The k of one request: its own `lora_drop_k`, or the served k.

    Args:
        least: the lowest k that a request may bring; None where it may bring none

    Raises:
        ValueError: not an integer from `least` to the served k, or not allowed.
    """
    value = (extra_args or {}).get(ARGUMENT, served_k)
    if least is None and ARGUMENT in (extra_args or {}):
        raise ValueError(
            f"vllm_xargs.{ARGUMENT}={shown(value)}: this server was started with "
            "lora_drop.request_k=false, k is the same for all requests; leave it out."
        )
    floor = least or 0
    if not isinstance(value, int) or isinstance(value, bool) or not floor <= value <= served_k:
        what = f'lora_drop.request_k={{"min": {floor}}}' if floor else "every step runs all layers"
        raise ValueError(
            f"vllm_xargs.{ARGUMENT}={shown(value)}: expected an integer from {floor} ({what}) to "
            f"{served_k}, the k this server was started with."
        )
    return value


def install() -> None:
    """Checks every request to an engine served with `--model-impl lora_drop`."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if getattr(original, "lora_drop", False):
        return

    @wraps(original)
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.model_config.model_impl == MODEL_IMPL:
            if kwargs.get("resumable"):
                raise VLLMValidationError(
                    "streaming input: --model-impl lora_drop does not support prompts that "
                    "continue after an answer; send each turn as a request of its own."
                )
            if isinstance(params, SamplingParams):
                served = self.vllm_config.additional_config[SETTINGS]
                try:
                    request_k(params.extra_args, served["k"], served["least_k"])
                    step_kinds.check(params, LoRADropConfig.from_dict(served))
                except ValueError as error:
                    raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return original(self, request_id, prompt, params, *args, **kwargs)

    process_inputs.lora_drop = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
