"""The vLLM names and parameters that `engine/` relies on, and the check that they still exist."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.families import FAMILIES


@dataclass(frozen=True)
class Seam:
    """One touch-point: a name in vLLM, the parameters we use, and who uses them."""

    target: str  # module:qualname
    used_by: str
    params: tuple[str, ...] = ()


SEAMS: tuple[Seam, ...] = (
    # patched attributes: reason and removal condition stand in the file that patches
    Seam("vllm.config.vllm:VllmConfig.try_verify_and_update_config", "activation.py", ("self",)),
    Seam(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "request_args.py",
        ("self", "request_id", "prompt", "params", "resumable"),
    ),
    Seam(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "stat_logger.py",
        ("vllm_config", "engine_idxs", "custom_stat_loggers"),
    ),
    # overridden methods
    Seam(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
        "scheduler.py",
        ("scheduler_output",),
    ),
    Seam("vllm.v1.core.sched.scheduler:Scheduler.schedule", "scheduler.py", ("throttle_prefills",)),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks", "scheduler.py", ("request",)
    ),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit",
        "scheduler.py",
        ("request",),
    ),
    Seam("vllm.v1.core.sched.scheduler:Scheduler.make_stats", "scheduler.py", ("self",)),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "scheduler.py",
        ("scheduler_output", "model_runner_output"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate",
        "kv_cache.py",
        (
            "request_id",
            "num_tokens",
            "new_computed_blocks",
            "total_computed_tokens",
            "num_local_computed_tokens",
        ),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager._has_partial_local_hit",
        "kv_cache.py",
        ("new_computed_blocks", "num_local_computed_tokens"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.new_step_starts",
        "kv_cache.py",
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks",
        "kv_cache.py",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks",
        "kv_cache.py",
        ("request", "num_tokens"),
    ),
    Seam(
        "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec", "kv_cache.py", ("manager_class",)
    ),
    Seam(
        "vllm.v1.attention.backend:subclass_attention_backend_with_overrides",
        "attention.py",
        ("name_prefix", "attention_backend_cls", "overrides"),
    ),
    Seam(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "attention.py",
        ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping", "max_seq_len"),
    ),
    Seam(
        "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec",
        "attention.py",
        ("vllm_config",),
    ),
    Seam(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
        "runner_v2.py",
        ("input_batch",),
    ),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.__init__",
        "cuda_graphs.py",
        ("vllm_config", "device", "cudagraph_mode", "decode_query_len", "lora_capture_cases"),
    ),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.capture",
        "cuda_graphs.py",
        ("lora_capture_hook",),
    ),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch",
        "cuda_graphs.py",
        ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
    ),
    Seam("vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates", "cuda_graphs.py"),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
        "cuda_graphs.py",
        ("num_active_loras",),
    ),
    Seam("vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache", "cuda_graphs.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker._make_model_runner", "worker_gpu.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.execute_model", "worker.py", ("scheduler_output",)),
    Seam("vllm.v1.worker.gpu_worker:Worker.reload_weights", "worker_cpu.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.sample_tokens", "worker_cpu.py", ("grammar_output",)),
    # what is called
    Seam("vllm.compilation.backends:set_model_tag", "models.py", ("tag",)),
    Seam(
        "vllm.v1.attention.selector:get_attn_backend",
        "attention.py",
        ("head_size", "dtype", "kv_cache_dtype", "num_heads"),
    ),
    Seam("vllm.utils.torch_utils:_encode_layer_name", "drop_layer.py", ("layer_name",)),
    # module layouts the drop layer runs on
    Seam(
        "vllm.model_executor.layers.layernorm:RMSNorm.forward_native",
        "drop_layer.py",
        ("x", "residual"),
    ),
    *(
        Seam(
            f"vllm.model_executor.models.{name.lower()}:{name}DecoderLayer.forward",
            "drop_layer.py",
            ("positions", "hidden_states", "residual"),
        )
        for name in dict.fromkeys(family.vllm_name for family in FAMILIES)
    ),
    Seam(
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update",
        "drop_layer.py",
        ("key", "value", "layer_name"),
    ),
    # fields that carry our data
    Seam("vllm.v1.metrics.stats:SchedulerStats", "metrics.py", params=("waiting_lora_adapters",)),
    Seam(
        "vllm.v1.engine:EngineCoreOutput",
        "step_kinds.py",
        params=("request_id", "new_token_ids", "kv_transfer_params"),
    ),
    Seam("vllm.outputs:RequestOutput", "step_kinds.py", ("outputs", "kv_transfer_params")),
    Seam("vllm.outputs:CompletionOutput", "step_kinds.py", ("index", "token_ids")),
    Seam(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "scheduler.py",
        params=("num_scheduled_tokens",),
    ),
)


def resolve_name(target: str) -> Any:
    """Import `module:qualname`."""
    module, qualname = target.split(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def check_seams(seams: Sequence[Seam] = SEAMS) -> None:
    """Raises when the installed vLLM no longer offers what engine/ was written against."""
    for seam in seams:
        try:
            found = resolve_name(seam.target)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{seam.target} is gone; engine/{seam.used_by} relies on it. Port that file, then "
                "widen the vLLM pin in pyproject.toml."
            ) from error
        _check_lost(seam.target, seam.params, inspect.signature(found).parameters, seam.used_by)


def lost(seams: Sequence[Seam] = SEAMS) -> list[str]:
    """A message for each seam that the installed vLLM no longer offers."""
    found = []
    for seam in seams:
        try:
            check_seams([seam])
        except RuntimeError as error:
            found.append(str(error))
    return found


def check_attributes(found: object, names: Sequence[str], used_by: str) -> None:
    """Raises when an object of vLLM lacks attributes that engine/ sets or reads."""
    kind = type(found)
    have = [name for name in names if hasattr(found, name)]
    _check_lost(f"{kind.__module__}:{kind.__qualname__}", names, have, used_by)


def _check_lost(target: str, names: Sequence[str], have: Collection[str], used_by: str) -> None:
    if missing := [name for name in names if name not in have]:
        raise RuntimeError(
            f"{target} lost {missing}; engine/{used_by} relies on them. Port that file, then "
            "widen the vLLM pin in pyproject.toml."
        )
