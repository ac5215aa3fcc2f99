"""`--model-impl lora_drop`: checks that it can be served and points vLLM at our classes.

Patches `VllmConfig.try_verify_and_update_config`. Reason: vLLM's per-model hook
(`MODELS_CONFIG_MAP`) is keyed by architecture, so the stock model would silently serve an
architecture without an entry. Removal condition: vLLM lets a plugin register a
`model_impl`.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from lora_drop_vllm.config import (
    HELP,
    MODEL_IMPL,
    SETTINGS,
    LoRADropConfig,
    LoRADropConfigError,
    resolve,
)
from lora_drop_vllm.families import FAMILIES
from lora_drop_vllm.method.adapter import BaseModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURES = {family.architecture: family.served for family in FAMILIES}
SCHEDULER = "lora_drop_vllm.engine.scheduler.LoRADropScheduler"
WORKERS = {
    "cpu": "lora_drop_vllm.engine.worker_cpu.LoRADropCPUWorker",
    "cuda": "lora_drop_vllm.engine.worker_gpu.LoRADropGPUWorker",
}


def install() -> None:
    """Acts on `model_impl` in every `VllmConfig` of this process; a second call changes nothing."""
    from vllm.config import VllmConfig

    original = VllmConfig.try_verify_and_update_config
    if getattr(original, "lora_drop", False):
        return

    @wraps(original)
    def verify(self: VllmConfig) -> None:
        model_config = self.model_config
        wanted = model_config is not None and model_config.model_impl == MODEL_IMPL
        if wanted and not getattr(model_config, "config_updated", False):  # vLLM's once-only mark
            activate(self)
        original(self)

    verify.lora_drop = True  # type: ignore[attr-defined]
    VllmConfig.try_verify_and_update_config = verify


def activate(vllm_config: VllmConfig) -> None:
    """Resolves the settings of a model served with `--model-impl lora_drop`, and sets our classes.

    Raises:
        LoRADropConfigError: settings, model or engine features that cannot be served.
    """
    from vllm.logger import init_logger

    from lora_drop_vllm.engine import exit_status, request_args, seams, stat_logger, step_kinds
    from lora_drop_vllm.engine.refusals import check_architecture, check_supported

    logger = init_logger("vllm.lora_drop")
    model_config = vllm_config.model_config
    check_architecture(vllm_config, list(ARCHITECTURES))
    seams.check_seams()
    config = _resolve_settings(vllm_config)
    check_supported(vllm_config, config)
    vllm_config.additional_config = {**vllm_config.additional_config, SETTINGS: config.as_dict()}
    request_args.install()
    exit_status.install()
    if config.active:
        architecture = model_config.hf_config.architectures[0]
        model_config.hf_config.architectures = [ARCHITECTURES[architecture]]
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.device_config.device_type]
        stat_logger.install()
        step_kinds.install()
    logger.info("%s", startup_line(model_config.model, config, model_config.hf_text_config))


def active_config(vllm_config: VllmConfig) -> LoRADropConfig:
    """The resolved settings, in any process of the engine."""
    additional: Any = vllm_config.additional_config
    return LoRADropConfig.from_dict(additional[SETTINGS])


def startup_line(model: str, config: LoRADropConfig, hf_config: Any) -> str:
    """The log line that says what is served."""
    from lora_drop_vllm.method.cost import LayerReads, kv_saving, layers_only_speed

    if not config.active:
        return (
            f"LoRA-Drop is off for {model} (k={config.k}, {len(config.sites.layers)} drop layers): "
            "serving the stock model"
        )
    n = config.num_layers
    speed = layers_only_speed(n, config.sites, config.k, LayerReads.of(hf_config))
    saved = kv_saving(n, len(config.sites.layers), config.k) if config.kv_skips else 0.0
    return (
        f"LoRA-Drop serves {model}: D={config.sites.layers} of {n} layers"
        f"{_attention_only(config)}, "
        f"rho={config.rho:.2f}, k={config.k}, reuse={config.reuse}, kv={config.kv}, "
        f"injection={config.injection}, adapter={config.adapter or 'untrained'}; "
        f"ideal speed {speed:.2f}x (layers alone), KV saved {saved:.1%} of generated tokens"
    )


def _attention_only(config: LoRADropConfig) -> str:
    attention = config.sites.attention_only
    return f" (only the attention of {attention})" if attention else ""


def _resolve_settings(vllm_config: VllmConfig) -> LoRADropConfig:
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or SETTINGS not in additional:
        raise LoRADropConfigError(f"--model-impl lora_drop needs settings: {HELP}.")
    return resolve(additional[SETTINGS], BaseModel.of(vllm_config.model_config.hf_config))
