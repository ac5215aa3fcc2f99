"""Shapes with dummy weights, and engines in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from support import filled_context

SHAPES: dict[str, dict[str, Any]] = {
    "135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "1b": dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "llama-3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "llama-2-7b": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
    "qwen2.5-7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "qwen2.5-14b": dict(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
}


def make_shape(folder: Path, name: str, num_layers: int | None = None) -> Path:
    """Folder with nothing but a config, for dummy weights; `layers` overrides its depth."""
    from transformers import LlamaConfig, Qwen2Config

    shape = SHAPES[name] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    qwen = name.startswith("qwen")
    config = (Qwen2Config if qwen else LlamaConfig)(
        architectures=["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        max_position_embeddings=16384,
        dtype="bfloat16",
        **shape,
    )
    config.save_pretrained(folder)
    return folder


def lora_drop(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Engine arguments that serve with these settings; none for the stock model."""
    if settings is None:
        return {}
    return dict(model_impl="lora_drop", additional_config={"lora_drop": settings})


def quiet() -> None:
    """Engine inside this process, without a hub and without chatter."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )


class Engine:
    """Engine in a process of its own; it is up when `wait` returns.

    Args:
        model: folder
        settings: settings of LoRA-Drop, or None for the stock model
        arguments: arguments of vLLM's `LLM`; without `load_format`, the weights are made up
        filled: whether `decode` fills the prompts' KV with a constant instead of computing it
    """

    def __init__(
        self,
        model: str,
        settings: dict[str, Any] | None,
        arguments: dict[str, Any],
        filled: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        given = (other, model, arguments | lora_drop(settings), filled)
        self.process = context.Process(target=_serve, args=given, daemon=True)
        self.filled = filled
        self.process.start()
        other.close()

    def wait(self) -> None:
        """Waits until the engine is up.

        Raises:
            EOFError: its process ended first.
        """
        assert self.pipe.recv() == "ready"

    def decode(self, batch: int, prompt: int, tokens: int, k: int | None) -> dict[str, Any]:
        """Decodes `tokens` tokens for `batch` requests that arrive at once.

        Filled prompts have one token more, which is computed.

        Returns:
            `times`: milliseconds of the steps after the last prompt's in which every request
            got a token; `lora_steps`: how many of the engine's steps were LoRA steps;
            `gpu_bytes`: the most GPU memory the engine has held so far, 0 on a CPU.
        """
        return self._ask(_decode, batch, prompt, tokens, k, self.filled)

    def answer(self, prompt: list[int], tokens: int, k: int) -> dict[str, Any]:
        """An answer of `tokens` tokens, drawn at temperature 1.

        Returns:
            `prompt`; `tokens`; `logprobs`: the log-probability of each token.
        """
        return self._ask(_answer, prompt, tokens, k)

    def fill(
        self, batch: int, prompt: int, tokens: int, stop_at_preemption: bool = False
    ) -> dict[str, Any]:
        """Runs `batch` requests that arrive at once to their end, or to the first preemption.

        Returns:
            `seconds`; `preemptions`; `lora_steps`; `blocks` of the KV pool; `most_blocks` that
            were held and `most_running` requests that ran at once.
        """
        return self._ask(_fill, batch, prompt, tokens, stop_at_preemption)

    def _ask(self, *what: Any) -> dict[str, Any]:
        self.pipe.send(what)
        found: dict[str, Any] = self.pipe.recv()
        return found

    def close(self) -> None:
        """Stops the process."""
        self.pipe.send(None)
        self.process.join(20)
        self.process.kill()


def _serve(pipe: Any, model: str, arguments: dict[str, Any], filled: bool) -> None:
    quiet()
    import torch
    from vllm import LLM

    fixed = dict(skip_tokenizer_init=True, enable_prefix_caching=filled, seed=0)
    engine = LLM(model, **({"load_format": "dummy"} | fixed | arguments)).llm_engine
    if filled:
        filled_context.write_cache(engine)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        measure, *sizes = asked
        found = measure(engine, *sizes)
        held = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        pipe.send(found | {"gpu_bytes": held})


def _add(engine: Any, batch: int, prompt: int, tokens: int, k: int | None = None) -> None:
    from vllm import SamplingParams

    extra = None if k is None else {"lora_drop_k": k}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
    for n, ids in enumerate(_prompts(batch, prompt)):
        engine.add_request(str(n), {"prompt_token_ids": ids}, params)


def _prompts(batch: int, length: int) -> list[list[int]]:
    """Prompts that share no prefix."""
    return [[7 + (n + j) % 500 for j in range(length)] for n in range(batch)]


def check_steps(lora_steps: int, tokens: int, k: int) -> None:
    """Raises RuntimeError unless a decode ran the LoRA steps that this k makes.

    Args:
        tokens: number of generated tokens; the prompts' step made the first
    """
    wanted = (tokens - 1) - (tokens - 1) // (k + 1)  # one step in k + 1 is full
    if abs(lora_steps - wanted) > (k > 0):
        raise RuntimeError(f"{lora_steps} LoRA steps instead of {wanted}")


def lora_steps(scheduler: Any) -> int:
    """LoRA steps that an engine has run; 0 for the stock model."""
    tracker = getattr(scheduler, "tracker", None)
    return tracker.totals.lora_steps if tracker else 0


def _decode(
    engine: Any, batch: int, prompt: int, tokens: int, k: int | None, filled: bool
) -> dict[str, Any]:
    scheduler = engine.engine_core.engine_core.scheduler
    if filled:
        filled_context.fill(engine, _prompts(batch, prompt + 1))
    before = lora_steps(scheduler)
    _add(engine, batch, prompt + filled, tokens, k)
    times, produced = [], []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        times.append(1000 * (time.perf_counter() - start))
        produced.append(len(outputs))
        if filled and any(output.num_cached_tokens != prompt for output in outputs):
            raise RuntimeError(
                f"prompts of {prompt} tokens were not found whole in the prefix cache; they must "
                "fill stock vLLM's KV blocks: multiples of 128 on a CPU"
            )
    together = [t for t, count in zip(times, produced, strict=True) if count == batch]
    return {"times": together[1:], "lora_steps": lora_steps(scheduler) - before}


def _answer(engine: Any, prompt: list[int], tokens: int, k: int) -> dict[str, Any]:
    from vllm import SamplingParams

    extra = {"lora_drop_k": k}
    params = SamplingParams(
        seed=0, max_tokens=tokens, ignore_eos=True, logprobs=0, extra_args=extra
    )
    engine.add_request("0", {"prompt_token_ids": prompt}, params)
    output = None
    while engine.has_unfinished_requests():
        (output,) = engine.step() or (output,)
    assert output is not None
    ids, found = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    said = [float(of[token].logprob) for token, of in zip(ids, found, strict=True)]
    return {"prompt": prompt, "tokens": ids, "logprobs": said}


def _fill(engine: Any, batch: int, prompt: int, tokens: int, stop: bool) -> dict[str, Any]:
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = least = pool.get_num_free_blocks()
    before, running = lora_steps(scheduler), 0
    _add(engine, batch, prompt, tokens)
    preempted: dict[str, int] = {}  # preemptions by request
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
        least = min(least, pool.get_num_free_blocks())
        running = max(running, len(scheduler.running))
        preempted |= {n: r.num_preemptions for n, r in scheduler.requests.items()}
        if stop and any(preempted.values()):
            engine.abort_request([str(n) for n in range(batch)])
    return {
        "seconds": time.perf_counter() - start,
        "preemptions": sum(preempted.values()),
        "lora_steps": lora_steps(scheduler) - before,
        "blocks": free,
        "most_blocks": free - least,
        "most_running": running,
    }
