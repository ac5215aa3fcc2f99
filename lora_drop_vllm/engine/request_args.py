"""Per-request k: `"vllm_xargs": {"lora_drop_k": N}`, checked before the request is queued.

Patches `InputProcessor._validate_params`. Reason: it is where vLLM turns bad request parameters
into an HTTP 400 for the server and an error of the Python API alike; its plugin point for
extra arguments is a logits processor, which would slow every step down. Removal condition: vLLM
lets a plugin validate `extra_args` without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from lora_drop_vllm.method.untrusted import shown

ARGUMENT = "lora_drop_k"


def request_k(extra_args: Mapping[str, Any] | None, served_k: int, allowed: bool = True) -> int:
    """The k of one request: its `lora_drop_k`, or else the served k.

    Args:
        allowed: the setting `request_k`, whether a request may bring a k at all

    Raises:
        ValueError: not an integer from 0 to the served k, or not allowed.
    """
    value = (extra_args or {}).get(ARGUMENT, served_k)
    if not allowed and ARGUMENT in (extra_args or {}):
        raise ValueError(
            f"vllm_xargs.{ARGUMENT}={shown(value)}: this server was started with "
            "lora_drop.request_k=false, k is the same for all requests; leave it out."
        )
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= served_k:
        raise ValueError(
            f"vllm_xargs.{ARGUMENT}={shown(value)}: expected an integer from 0 (every step runs "
            f"all layers) to {served_k}, the k this server was started with."
        )
    return value


def install() -> None:
    """Check `lora_drop_k` of every request to an engine served with `--model-impl lora_drop`."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    from lora_drop_vllm.engine.activation import MODEL_IMPL, SETTINGS

    original = InputProcessor._validate_params
    if getattr(original, "lora_drop", False):
        return

    @wraps(original)
    def validate(self: InputProcessor, params: Any, supported_tasks: Any) -> bool | None:
        if self.model_config.model_impl == MODEL_IMPL and isinstance(params, SamplingParams):
            served = self.vllm_config.additional_config[SETTINGS]
            try:
                request_k(params.extra_args, served["k"], served["request_k"])
            except ValueError as error:
                raise VLLMValidationError(str(error), parameter=ARGUMENT) from error
        return original(self, params, supported_tasks)

    validate.lora_drop = True  # type: ignore[attr-defined]
    InputProcessor._validate_params = validate
