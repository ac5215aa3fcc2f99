"""Models and engine features that LoRA-Drop refuses, before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_drop_vllm.config import LoRADropConfig, LoRADropConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, OffloadConfig, ParallelConfig, VllmConfig

LEAVE_OUT = "leave it out"
# what tests on CPU kernels show to work
KV_DTYPES = ("auto", "fp8", "fp8_e4m3")
EXECUTORS = (None, "uni", "mp", "ray", "external_launcher")
OTHER_KIND = "use a checkpoint by compressed-tensors, AWQ or GPTQ"
QUANTIZED = (None, "compressed-tensors", "awq", "auto_awq", "gptq", "auto_gptq")


def check_architecture(vllm_config: VllmConfig, allowed: list[str]) -> None:
    """Raises unless the model's family has a LoRA-Drop variant."""
    architectures = vllm_config.model_config.hf_config.architectures
    if not architectures or architectures[0] not in allowed:
        raise LoRADropConfigError(
            f"--model-impl lora_drop: {vllm_config.model_config.model} is a "
            f"{', '.join(architectures or ['model without an architecture'])}; supported are "
            f"{', '.join(allowed)}. Serve it without --model-impl lora_drop."
        )


def check_supported(vllm_config: VllmConfig, config: LoRADropConfig) -> None:
    """Raises for every engine feature that LoRA-Drop does not implement.

    Raises:
        LoRADropConfigError: naming the feature as the user wrote it and the way out.
    """
    for used, feature, way_out in _refusals(vllm_config):
        if used:
            raise LoRADropConfigError(
                f"--model-impl lora_drop does not support {feature}; {way_out}."
            )
    layer_types = getattr(vllm_config.model_config.hf_config, "layer_types", None) or []
    sliding = [i for i in config.sites.layers if "sliding" in "".join(layer_types[i : i + 1])]
    if sliding:
        raise LoRADropConfigError(
            f"lora_drop.drop_layers={config.sites.layers}: layers {sliding} use "
            "sliding-window attention, which LoRA-Drop does not support; leave them out."
        )


def _refusals(vllm_config: VllmConfig) -> list[tuple[bool, str, str]]:
    from vllm import envs

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    device = vllm_config.device_config.device_type
    return [
        (model.runner_type != "generate", f"--runner {model.runner_type}", "use it to generate"),
        (vllm_config.speculative_config is not None, "speculative decoding", LEAVE_OUT),
        *_parallelism(parallel),
        (envs.VLLM_USE_BREAKABLE_CUDAGRAPH, "VLLM_USE_BREAKABLE_CUDAGRAPH=1", "unset it"),
        # it answers HTTP by itself: no check of a request's k, no counters, no kinds of steps
        (envs.VLLM_USE_RUST_FRONTEND, "VLLM_USE_RUST_FRONTEND=1", "unset it"),
        # the kind of a request's steps depends on who else is in the batch
        (envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT=1", "unset it"),
        (scheduler.scheduler_cls is not None, "--scheduler-cls", LEAVE_OUT),
        (vllm_config.lora_config is not None, "--enable-lora", LEAVE_OUT),
        (vllm_config.kv_transfer_config is not None, "--kv-transfer-config", LEAVE_OUT),
        (vllm_config.ec_transfer_config is not None, "--ec-transfer-config", LEAVE_OUT),
        *_quantization(model, device),
        (model.enable_prompt_embeds, "--enable-prompt-embeds", LEAVE_OUT),
        (bool(model.logits_processors), "--logits-processors", LEAVE_OUT),
        (cache.cache_dtype not in KV_DTYPES, f"--kv-cache-dtype {cache.cache_dtype}", LEAVE_OUT),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill", LEAVE_OUT),
        (bool(cache.kv_offloading_size), "--kv-offloading-size", LEAVE_OUT),
        *_offloading(vllm_config.offload_config),
        (
            bool(scheduler.disable_hybrid_kv_cache_manager),
            "--disable-hybrid-kv-cache-manager",
            LEAVE_OUT,
        ),
        (
            model.get_sliding_window() is not None,
            "models with sliding-window attention",
            "serve it without --model-impl lora_drop",
        ),
        # its model is built by another process, with that process's adapter
        (vllm_config.load_config.load_format == "ipc_cache", "--load-format ipc_cache", LEAVE_OUT),
        *_device(vllm_config, device),
    ]


def _parallelism(parallel: ParallelConfig) -> list[tuple[bool, str, str]]:
    from vllm import envs

    executor = parallel.distributed_executor_backend
    return [
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size > 1", "set it to 1"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism",
            "set it to 1",
        ),
        (parallel.enable_dbo, "--enable-dbo", LEAVE_OUT),
        (parallel.worker_cls != "auto", "--worker-cls", LEAVE_OUT),
        # these executors may call the model runner past our worker, which gives each step its plan
        (
            executor == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND,
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0",
            "unset it",
        ),
        (executor not in EXECUTORS, f"--distributed-executor-backend {executor}", LEAVE_OUT),
    ]


def _device(vllm_config: VllmConfig, device: str) -> list[tuple[bool, str, str]]:
    from vllm.platforms import current_platform

    return [
        (device not in ("cpu", "cuda"), f"the device {device}", "use a CPU or a CUDA GPU"),
        (
            device == "cuda" and not vllm_config.use_v2_model_runner,
            "the V1 model runner on a GPU",
            "unset VLLM_USE_V2_MODEL_RUNNER",
        ),
        # at ranks above 32 the kernels' tiles do not fit into the shared memory of older ones
        (
            device == "cuda" and not current_platform.has_device_capability(80),
            "GPUs below compute capability 8.0",
            "use a newer one",
        ),
    ]


def _quantization(model: ModelConfig, device: str) -> list[tuple[bool, str, str]]:
    flag = f"--quantization {model.quantization}"
    settings = getattr(model.hf_config, "quantization_config", None) or {}
    groups = (settings.get("config_groups") or {}).values()
    formats = [settings.get("format"), *(group.get("format") for group in groups)]
    by_name = model.quantization not in (None, "compressed-tensors")
    int4 = by_name or "pack-quantized" in formats
    return [
        (model.quantization not in QUANTIZED, flag, OTHER_KIND),
        (
            device == "cpu" and int4 and not has_int4_kernel(),
            f"INT4 weights ({flag}) on a CPU without AVX-512, for which vLLM has no kernel",
            "serve an FP8 copy, or the model that is not quantized",
        ),
    ]


def has_int4_kernel() -> bool:
    """True if vLLM's CPU library for this processor computes with INT4 weights.

    vLLM itself would start without, and end at the first step.
    """
    import vllm._custom_ops  # noqa: F401 - loads the library

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def _offloading(offload: OffloadConfig) -> list[tuple[bool, str, str]]:
    """Weight offloading, which wraps the layers' `forward` before they become drop layers."""
    return [
        (offload.uva.cpu_offload_gb > 0, "--cpu-offload-gb", LEAVE_OUT),
        (offload.prefetch.offload_group_size > 0, "--offload-group-size", LEAVE_OUT),
        (offload.offload_backend != "auto", "--offload-backend", LEAVE_OUT),
    ]
