"""Many requests at once: whatever the engine makes of a batch, the oracle follows its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from environment import V2
from oracle import Oracle
from serving import Engine, Serve, check_all_released, longest_lora_run, replay, settings_of
from tiny import make_adapter, prompt_of

pytestmark = pytest.mark.engine

DROP = [3, 5]


def check_against_oracle(
    engine: Engine, hf: Any, settings: Any, prompts: list[list[int]], outputs: list[Any]
) -> None:
    """Every request's tokens are the oracle's under the recorded step kinds, of both kinds."""
    assert {step.kind for step in engine.steps} == {"full", "lora"}
    ids = list(dict.fromkeys(i for step in engine.steps for i in step.requests))
    assert len(ids) == len(prompts)
    for request_id, prompt, output in zip(ids, prompts, outputs, strict=True):
        oracle = Oracle(hf, settings)
        assert output.tokens == replay(engine.steps, request_id, prompt, oracle)
        assert longest_lora_run(engine.steps, request_id) <= settings.k


@pytest.fixture
def adapter(models: dict[str, Path], tmp_path: Path) -> tuple[Any, Any, dict[str, Any]]:
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=DROP)
    return config, tensors, {"adapter": str(tmp_path)}


@pytest.mark.runners
def test_requests_of_different_lengths_join_and_leave(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], adapter: Any
) -> None:
    config, tensors, settings = adapter
    engine = serve(models["llama"], settings, max_num_seqs=3)
    engine.record()
    prompts = [prompt_of(n) for n in (5, 40, 11, 3, 70, 9)]
    outputs = engine.generate(prompts, [20, 7, 15, 9, 4, 12])
    check_against_oracle(engine, hf_models["llama"], settings_of(config, tensors), prompts, outputs)
    check_all_released(engine)
    kinds = {step.kind for step in engine.steps}
    assert kinds == {"full", "lora"}
    assert engine.counts()["lora"] == sum(step.kind == "lora" for step in engine.steps)


@pytest.mark.runners
def test_chunked_prefill_of_16_tokens(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], adapter: Any
) -> None:
    config, tensors, settings = adapter
    engine = serve(
        models["llama"], settings, max_num_batched_tokens=16, max_num_seqs=4, max_model_len=256
    )
    engine.record()
    prompts = [prompt_of(n) for n in (5, 49, 33, 16, 17)]
    outputs = engine.generate(prompts, [18, 10, 12, 8, 9])
    check_against_oracle(engine, hf_models["llama"], settings_of(config, tensors), prompts, outputs)
    check_all_released(engine)
    for step in engine.steps:
        if any(count > 1 for _, count in step.requests.values()):
            assert step.kind == "full"


@pytest.mark.parametrize(
    ("kv", "injection"),
    [
        pytest.param("skip", "block", id="skip"),
        pytest.param("write", "block", id="write"),
        pytest.param("skip", "attn", id="skip-attn", marks=pytest.mark.matrix),
        pytest.param("skip", "mixed", id="skip-mixed", marks=pytest.mark.matrix),
        pytest.param("write", "mixed", id="write-mixed", marks=pytest.mark.matrix),
    ],
)
def test_prefix_cache_hits_give_the_same_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    kv: str,
    injection: str,
) -> None:
    config, tensors = make_adapter(
        tmp_path, models["llama"], drop_layers=DROP, kv=kv, injection=injection
    )
    engine = serve(models["llama"], {"adapter": str(tmp_path)})
    shared = prompt_of(210)
    prompts = [shared + prompt_of(7, seed) for seed in (1, 2)] + [shared]
    outputs = [engine.generate([prompt], 20)[0] for prompt in prompts]
    settings = settings_of(config, tensors)
    for prompt, output in zip(prompts, outputs):
        assert output.tokens == Oracle(hf_models["llama"], settings).decode(prompt, 20)
    assert engine.counts() == {"full": 3 * 5, "lora": 3 * 15}
    assert outputs[0].cached == 0
    assert outputs[1].cached >= 96 and outputs[2].cached >= 96
    if kv == "skip":
        check_all_released(engine)


@pytest.mark.runners
def test_a_prefix_hit_may_end_inside_a_block(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path
) -> None:
    """Blocks of 64 and 96 tokens end together at 192 only; hits come in steps of 32."""
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=[3, 4, 5])
    engine = serve(models["llama"], {"adapter": str(tmp_path)})
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    assert sorted(g.kv_cache_spec.block_size for g in groups) == [64, 96]
    first = prompt_of(170)
    prompts = [first, first, first + prompt_of(60), first[:100] + prompt_of(50)]
    outputs = [engine.generate([prompt], 10)[0] for prompt in prompts]
    settings = settings_of(config, tensors)
    for prompt, output in zip(prompts, outputs):
        assert output.tokens == Oracle(hf_models["llama"], settings).decode(prompt, 10)
    assert [output.cached for output in outputs] == [0, 160, 160, 0]
    engine.record()
    twins = [prompt_of(150, seed=1)] * 2
    outputs = engine.generate(twins, 6)  # at once: the second waits for what the first writes
    assert [output.cached for output in outputs] == [0, 128]
    check_against_oracle(engine, hf_models["llama"], settings, twins, outputs)
    check_all_released(engine)


def test_generated_tokens_are_not_shared_as_a_prefix(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], adapter: Any
) -> None:
    """Their keys and values, where there are any, are not what a prompt would compute."""
    config, tensors, settings = adapter
    engine = serve(models["llama"], settings)
    prompt = prompt_of(20)
    (first,) = engine.generate([prompt], 240)
    longer = prompt + first.tokens
    (second,) = engine.generate([longer], 16)
    oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
    assert second.tokens == oracle.decode(longer, 16)
    assert second.cached <= len(prompt)


@pytest.mark.runners
@pytest.mark.parametrize(
    "injection",
    ["block", *(pytest.param(kind, marks=pytest.mark.matrix) for kind in ("attn", "mixed"))],
)
def test_preempted_requests_are_recomputed_as_prompts(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    injection: str,
) -> None:
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=DROP, injection=injection)
    engine = serve(
        models["llama"],
        {"adapter": str(tmp_path)},
        num_gpu_blocks_override=13,
        max_num_seqs=4,
        max_model_len=192,
    )
    engine.record()
    prompts = [prompt_of(n) for n in (60, 50, 40)]
    outputs = engine.generate(prompts, [110, 100, 90])
    restarts = 0
    for request_id in {i for step in engine.steps for i in step.requests}:
        starts = [s.requests[request_id][0] for s in engine.steps if request_id in s.requests]
        restarts += sum(later < earlier for earlier, later in zip(starts, starts[1:]))
    assert restarts > 0, "the pool was large enough for all: nothing was tested"
    check_against_oracle(engine, hf_models["llama"], settings_of(config, tensors), prompts, outputs)
    check_all_released(engine)


def test_requests_with_their_own_k_share_a_batch(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], adapter: Any
) -> None:
    from vllm import SamplingParams

    config, tensors, settings = adapter
    engine = serve(models["llama"], settings)
    engine.record()
    prompts = [prompt_of(6), prompt_of(9)]
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=20, extra_args={"lora_drop_k": k})
        for k in (1, 3)
    ]
    outputs = engine.llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
    )
    ids = list(dict.fromkeys(i for step in engine.steps for i in step.requests))
    assert [longest_lora_run(engine.steps, i) for i in ids] == [1, 1]
    for request_id, prompt, output in zip(ids, prompts, outputs):
        oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
        want = replay(engine.steps, request_id, prompt, oracle)
        assert list(output.outputs[0].token_ids) == want


def test_parallel_samples_each_follow_the_cycle(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any], adapter: Any
) -> None:
    config, tensors, settings = adapter
    engine = serve(models["llama"], settings)
    engine.record()
    prompt = prompt_of(9)
    from vllm import SamplingParams

    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    assert [step.kind for step in engine.steps].count("lora") >= 8
    check_all_released(engine)


@pytest.mark.parametrize(
    ("allowed", "refused", "why"),
    [
        (False, [0, 3], r"lora_drop_k=\d: .*lora_drop\.request_k=false"),  # not even the served k
        (
            {"min": 2},
            [0, 1],
            r'lora_drop_k=\d: .* from 2 \(lora_drop\.request_k=\{"min": 2\}\) to 3',
        ),
        (True, [-1, 4], r"lora_drop_k=-?\d: .* from 0 \(every step runs all layers\) to 3"),
    ],
    ids=["no request", "a floor", "any"],
)
def test_the_operator_says_which_k_requests_may_bring(
    serve: Serve, models: dict[str, Path], adapter: Any, allowed: Any, refused: list[int], why: str
) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    _, _, settings = adapter
    core = serve(models["llama"], settings | {"request_k": allowed}).llm.llm_engine
    prompt = {"prompt_token_ids": prompt_of(9)}
    for k in refused:
        with pytest.raises(VLLMValidationError, match=why):
            core.add_request("own", prompt, SamplingParams(extra_args={"lora_drop_k": k}))
    assert not core.has_unfinished_requests()
    if allowed:
        core.add_request("own", prompt, SamplingParams(extra_args={"lora_drop_k": 2}))
    core.add_request("none", prompt, SamplingParams())
    core.step()
    ks = [tracked.k for tracked in core.engine_core.engine_core.scheduler.tracker._tracked.values()]
    assert ks == ([2, 3] if allowed else [3])


def test_aborted_and_refused_requests_give_everything_back(
    serve: Serve, models: dict[str, Path], adapter: Any
) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    _, _, settings = adapter
    engine = serve(models["llama"], settings)
    core = engine.llm.llm_engine
    with pytest.raises(VLLMValidationError, match="streaming input"):
        core.input_processor.process_inputs(
            "part", {"prompt_token_ids": [3]}, SamplingParams(), ("generate",), resumable=True
        )
    for n in range(3):
        core.add_request(
            f"r{n}", {"prompt_token_ids": prompt_of(10 + n)}, SamplingParams(max_tokens=50)
        )
    for _ in range(6):
        core.step()
    core.abort_request(["r0", "r1", "r2"])
    core.step()
    check_all_released(engine)


@pytest.mark.skipif(V2, reason="a fault of the V1 runner on a CPU")
def test_a_seeded_prompt_may_come_in_chunks(
    serve: Serve, models: dict[str, Path], adapter: Any
) -> None:
    """It ends stock vLLM 0.32 on a CPU; and a chunk draws nothing from the request's generator."""
    prompts, told = [prompt_of(100), prompt_of(5)], []
    for budget in (64, 512):
        engine = serve(models["llama"], adapter[2], max_num_batched_tokens=budget, max_num_seqs=4)
        outputs = engine.generate(prompts, 12, temperature=1.0, seed=1)
        told.append([output.tokens for output in outputs])
    assert told[0] == told[1]
