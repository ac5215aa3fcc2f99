"""vLLM's offline engine: many prompts at once, for text to train on.

The types are plain, and vLLM is imported when an engine starts, so other folders can name them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOP = dict(min_pattern_size=8, max_pattern_size=128, min_count=3)  # tokens, tokens, times in a row
STEP_TOKENS = 4096  # of prompts in an engine step
ROOM = 0.25  # of the free memory, for the KV cache on a CPU, at most


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        temperature: 0 is greedy
        stop: ids of tokens that end the text, beside the model's own
        stop_text: strings that end it
    """

    tokens: list[int]
    max_tokens: int
    seed: int
    temperature: float = 0.0
    min_p: float = 0.0
    stop: tuple[int, ...] = ()
    stop_text: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What a request brought.

    Attributes:
        tokens: without the token that ended it
        end: `stop`, `length` (cut off) or `repetition` (a loop)
    """

    text: str
    tokens: list[int]
    end: str


Generator = Callable[[Sequence[Request]], list[Completion]]


@dataclass(frozen=True)
class OfflineEngine:
    """A running engine; a call continues prompts and returns completions in their order."""

    llm: Any
    facts: dict[str, Any]

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of the requests."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": request.tokens} for request in requests],
            [_sampling(request) for request in requests],
            use_tqdm=False,
        )
        return [_completion(output.outputs[0]) for output in outputs]


def start_engine(
    model: str, batch: int, context: int, adapter: Path | None = None
) -> OfflineEngine:
    """Starts vLLM: eager on a CPU, in bfloat16 where it has the instructions.

    Args:
        model: folder, or a name in the local Hugging Face cache
        batch: requests at once
        context: tokens of a prompt and its continuation
        adapter: serve the model with this adapter; None is the stock model

    Raises:
        RuntimeError: vLLM is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else pages of it around the progress
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a kill leaves no process behind
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("generate: needs vLLM, which is not installed; see the README")
    import torch
    import vllm

    cuda = torch.cuda.is_available()
    dtype = "auto" if cuda or _cpu_has_bfloat16() else "float32"
    size: dict[str, Any] = {}
    if not cuda:
        size["kv_cache_memory_bytes"] = _cpu_cache_bytes(model, batch, context, dtype)
    if adapter is not None:
        settings = {"lora_drop": {"adapter": str(adapter)}}
        size |= {"model_impl": "lora_drop", "additional_config": settings}
    llm = vllm.LLM(
        model,
        dtype=dtype,  # type: ignore[arg-type]  # a literal there
        enforce_eager=not cuda,
        max_model_len=context,
        max_num_seqs=batch,
        # a seeded request whose prompt comes in pieces ends vLLM 0.32's V1 runner on a CPU
        enable_chunked_prefill=cuda,
        max_num_batched_tokens=max(context, STEP_TOKENS),
        **size,
    )
    facts = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "dtype": str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
        "device": "cuda" if cuda else "cpu",
    }
    return OfflineEngine(llm, facts)


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams

    return SamplingParams(
        temperature=request.temperature,
        min_p=request.min_p,
        seed=request.seed if request.temperature else None,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop),
        stop=list(request.stop_text),
        repetition_detection=RepetitionDetectionParams(**LOOP),
    )


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
        tokens = tokens[:-1]
    return Completion(output.text, tokens, str(output.finish_reason))


def _cpu_has_bfloat16() -> bool:
    import torch

    return any(
        value
        for name, value in torch.cpu.get_capabilities().items()
        if name in ("avx512_bf16", "amx_bf16", "bf16")
    )


def _cpu_cache_bytes(model: str, batch: int, context: int, dtype: str) -> int:
    """Bytes for `batch` sequences, each a quarter full, or what fits; at least for a full one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = config.num_hidden_layers * (config.num_key_value_heads or heads) * head_dim
    slot: int = 2 * values * (4 if dtype == "float32" else 2)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    return slot * max(context + 256, min(batch * context // 4, int(ROOM * free) // slot))
