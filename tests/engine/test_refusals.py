"""What cannot be served stops at start-up; without `--model-impl lora_drop` nothing changes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantized_tiny import quantize
from tiny import load_model, make_adapter

from lora_drop_vllm.config import LoRADropConfig
from lora_drop_vllm.engine.activation import active_config
from lora_drop_vllm.engine.refusals import check_supported

pytestmark = pytest.mark.engine

UNTRAINED = {"untrained": True}


def engine_config(model: Path, settings: Any = UNTRAINED, **args: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    additional = {} if settings is None else {"lora_drop": settings}
    return EngineArgs(
        str(model),
        model_impl="lora_drop",
        additional_config=additional,
        skip_tokenizer_init=True,
        enforce_eager=True,
        **args,
    ).create_engine_config()


def stock_config(model: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(str(model), skip_tokenizer_init=True, enforce_eager=True)
    return args.create_engine_config()


def before_the_plugin(model: Path) -> tuple[Any, LoRADropConfig]:
    """vLLM's settings as the plugin sees them, to be changed to what no CPU can have; ours."""
    config = stock_config(model)
    config.parallel_config.worker_cls = "auto"
    return config, active_config(engine_config(model))


REFUSED = {
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding",
    ),
    "pipeline": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size > 1"),
    "executor": (
        {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"},
        "--distributed-executor-backend vllm",
    ),
    "ipc_cache": ({"load_format": "ipc_cache"}, "--load-format ipc_cache"),
    "lora": ({"enable_lora": True}, "--enable-lora"),
    "nvfp4_cache": ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4"),
    "e5m2_cache": ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
    "fp8": ({"quantization": "fp8"}, "--quantization fp8; use a checkpoint by compressed-tensors"),
    "quantization": ({"quantization": "experts_int8"}, "--quantization experts_int8; use a check"),
    "uva_offload": ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
    "prefetch_offload": ({"offload_group_size": 2}, "--offload-group-size"),
    "offload_backend": ({"offload_backend": "uva"}, "--offload-backend"),
    "scheduler": ({"scheduler_cls": "some.Scheduler"}, "--scheduler-cls"),
    "prompt_embeds": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "hybrid": ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_engine_features(models: dict[str, Path], case: str) -> None:
    args, feature = REFUSED[case]
    with pytest.raises(ValueError, match=f"does not support {feature}"):
        engine_config(models["llama"], **args)


def test_rays_older_executor(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the model runner past the worker, which would serve full steps as LoRA steps."""
    config, settings = before_the_plugin(models["llama"])
    config.parallel_config.distributed_executor_backend = "ray"  # Ray itself is not installed
    error = pytest.raises(ValueError, match="does not support VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0")
    for newer in ("0", "1"):
        monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", newer)
        with error if newer == "0" else contextlib.nullcontext():
            check_supported(config, settings)


def test_a_frontend_without_our_checks(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="does not support VLLM_USE_RUST_FRONTEND=1"):
        engine_config(models["llama"])


def test_an_old_gpu(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    config, settings = before_the_plugin(models["llama"])
    config.device_config.device_type = "cuda"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    for capability in (75, 80):
        at_least = lambda wanted, has=capability: has >= wanted  # noqa: E731
        monkeypatch.setattr(current_platform, "has_device_capability", at_least)
        error = pytest.raises(ValueError, match=r"support GPUs below compute capability 8\.0")
        with error if capability < 80 else contextlib.nullcontext():
            check_supported(config, settings)


@pytest.mark.parametrize("kind", ["int4", "gptq", "awq", "int8", "fp8"])
def test_int4_weights_without_a_kernel(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """vLLM would start on such a CPU, and end at the first step."""
    monkeypatch.setattr("lora_drop_vllm.engine.refusals.has_int4_kernel", lambda: False)
    quantize(load_model(models["qwen2"]), tmp_path, kind)
    four_bits = kind not in ("int8", "fp8")
    error = pytest.raises(ValueError, match=r"INT4 weights \(--quantization .* without AVX-512")
    with error if four_bits else contextlib.nullcontext():
        engine_config(tmp_path)


def test_no_settings_says_what_to_pass(models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"needs settings: pass --additional-config"):
        engine_config(models["llama"], None)


def test_bad_settings_reach_the_user(models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"lora_drop\.k=-1: expected an integer"):
        engine_config(models["llama"], UNTRAINED | {"k": -1})


def config_of(family: str, folder: Path, **changes: Any) -> Path:
    import transformers

    getattr(transformers, f"{family}Config")(
        architectures=[f"{family}ForCausalLM"],
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        **changes,
    ).save_pretrained(folder)
    return folder


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a GraniteForCausalLM; supported are Llama"):
        engine_config(config_of("Granite", tmp_path))


def test_a_sliding_window_in_every_layer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not support models with sliding-window attention"):
        engine_config(config_of("Mistral", tmp_path, sliding_window=64))


def test_sliding_window_layers(models: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((models["qwen2"] / "config.json").read_text())
    raw |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    raw.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="sliding-window attention"):
        engine_config(tmp_path)


def test_the_plugin_changes_nothing_when_not_asked_for(models: dict[str, Path]) -> None:
    config = stock_config(models["llama"])
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls.startswith("vllm.")
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert config.additional_config == {}


@pytest.mark.parametrize("settings", [{"k": 0}, {"rho": 0}], ids=str)
def test_switched_off_the_engine_is_vllms_own(models: dict[str, Path], settings: Any) -> None:
    config = engine_config(models["llama"], UNTRAINED | settings)
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls.startswith("vllm.")
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]


def test_an_adapter_that_is_replaced_while_the_server_starts(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from lora_drop_vllm.engine.models import _adapter_tensors

    make_adapter(tmp_path, models["llama"], drop_layers=[3, 5], r=4)
    config = active_config(engine_config(models["llama"], {"adapter": str(tmp_path)}))
    assert _adapter_tensors(config)
    make_adapter(tmp_path, models["llama"], drop_layers=[3, 5], r=8)
    with pytest.raises(ValueError, match="was replaced by another adapter while the server"):
        _adapter_tensors(config)


def test_the_server_exits_with_the_message(models: dict[str, Path]) -> None:
    settings = json.dumps({"lora_drop": UNTRAINED | {"rho": 2}})
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("vllm")),
            *("serve", str(models["llama"]), "--model-impl", "lora_drop", "--skip-tokenizer-init"),
            *("--additional-config", settings),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    assert "lora_drop.rho=2: expected 0 <= rho <= 1" in done.stdout + done.stderr
