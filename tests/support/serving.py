"""An engine in this process, with a record of every step it planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from oracle import Oracle, Settings

PROMPT = [5, 9, 300, 17, 44, 2, 8]


@dataclass
class Step:
    """One engine step as the scheduler planned it: kind, and (position, tokens) by request."""

    kind: str
    requests: dict[str, tuple[int, int]]


@dataclass
class Generated:
    tokens: list[int]
    logprobs: list[float]
    cached: int = 0


@dataclass
class Engine:
    llm: Any
    steps: list[Step] = field(default_factory=list)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def counts(self) -> dict[str, int]:
        """Steps by kind, counted where the model is called."""
        return {kind.value: n for kind, n in self.runner.model.lora_drop.counts.items()}

    def record(self) -> None:
        """Keep every plan the scheduler makes from now on."""
        tracker = self.scheduler.tracker
        advance = tracker.advance

        def recording(scheduled: Any) -> Any:
            scheduled = list(scheduled)
            plan = advance(scheduled)
            at = {s.request_id: (s.position, s.num_tokens) for s in scheduled}
            if at:
                self.steps.append(Step(plan.kind.value, at))
            return plan

        tracker.advance = recording

    def generate(self, prompts: list[list[int]], count: Any = 32, **sampling: Any) -> list[Any]:
        """Greedy tokens and log-probabilities; `count` may be a list, one per prompt."""
        from vllm import SamplingParams

        counts = count if isinstance(count, list) else [count] * len(prompts)
        params = [
            SamplingParams(
                **{"temperature": 0, "ignore_eos": True, "logprobs": 0, **sampling}, max_tokens=n
            )
            for n in counts
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
        )
        return [
            Generated(
                list(o.outputs[0].token_ids),
                [lp[t].logprob for t, lp in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)],
                o.num_cached_tokens or 0,
            )
            for o in outputs
        ]


class Serve:
    """`serve(model, settings)` starts an engine; starting the next one stops it."""

    engine: Engine | None = None

    def __call__(self, model: Path, settings: dict[str, Any] | None = None, **args: Any) -> Engine:
        from vllm import LLM

        self.stop()
        defaults: dict[str, Any] = dict(
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            kv_cache_memory_bytes=1 << 26,
            skip_tokenizer_init=True,
            seed=0,
        )
        if settings is not None:
            defaults |= dict(model_impl="lora_drop", additional_config={"lora_drop": settings})
        self.engine = Engine(LLM(str(model), **(defaults | args)))
        return self.engine

    def stop(self) -> None:
        if self.engine is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm.llm_engine.engine_core.shutdown()
        self.engine = None
        cleanup_dist_env_and_memory()


def replay(
    steps: list[Step],
    request_id: str,
    prompt: list[int],
    oracle: Oracle,
    forgets: bool = False,
) -> list[int]:
    """Feed the oracle the steps that a request went through; returns its generated tokens.

    A request that starts over at a lower position was preempted: all its tokens are a prompt
    again. With `forgets`, the engine drops the token of a step that was under way; prompts then
    have to come in one piece.
    """
    oracle.tokens = list(prompt)
    prompted, computed = False, 0
    for step in steps:
        position, count = step.requests.get(request_id, (0, 0))
        if not count:
            continue
        if position < computed:
            prompted = False
            if forgets:
                del oracle.tokens[position + count :]
        computed = position + count
        if computed < len(oracle.tokens):
            assert step.kind == "full", "a chunk of a prompt ran in a LoRA step"
            prompted = False
        elif prompted:
            assert count == 1
            oracle.step(step.kind)
        else:
            assert step.kind == "full", "a prompt ran in a LoRA step"
            oracle.prompt(oracle.tokens)
            prompted = True
    return oracle.tokens[len(prompt) :]


def settings_of(config: Any, tensors: Any, **override: Any) -> Settings:
    """The oracle's settings for an adapter."""
    given = dict(
        drop_layers=config.drop_layers,
        k=config.k,
        reuse=config.reuse,
        kv=config.kv,
        injection=config.injection,
        scale=config.scale,
        tensors=tensors,
        drop_attention=config.drop_attention,
    )
    return Settings(**(given | override))


def longest_lora_run(steps: list[Step], request_id: str) -> int:
    """Most LoRA steps in a row that a request went through."""
    longest = run = 0
    for step in steps:
        if request_id in step.requests:
            run = run + 1 if step.kind == "lora" else 0
            longest = max(longest, run)
    return longest


def assert_same(got: Any, want: list[int], oracle: Oracle) -> None:
    """Equal tokens, log-probabilities within 1e-3; two paths may only part at a tie."""
    parted = next((n for n, (a, b) in enumerate(zip(got.tokens, want)) if a != b), len(want))
    if parted < len(want):
        assert oracle.margins[parted] < 1e-4, f"token {parted}: {got.tokens[parted]}"
        assert parted > len(want) // 2, "the models are too close to ties to be compared"
    torch.testing.assert_close(
        torch.tensor(got.logprobs[:parted]),
        torch.tensor(oracle.logprobs[:parted]),
        atol=1e-3,
        rtol=0,
    )


def distance(model: Any, settings: Settings, got: Any) -> float:
    """Mean difference of a lone request's log-probabilities from the oracle's, on its tokens."""
    oracle, want = Oracle(model, settings), []
    oracle.prompt(PROMPT)
    for token in got.tokens:
        want.append(oracle.logits.log_softmax(-1)[token])
        oracle.tokens[-1] = token
        oracle.step("full" if oracle.phase >= settings.k else "lora")
    return float((torch.stack(want) - torch.tensor(got.logprobs)).abs().mean())


def check_all_released(engine: Engine) -> None:
    """After all requests ended, every block (but the null block) and every slot is back."""
    assert engine.scheduler.num_drop_blocks() == 0
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
    assert len(engine.scheduler.tracker._free_slots) == engine.scheduler.tracker.max_requests
