"""The served engine against the oracle: every reuse rule, KV mode, injection point and family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from environment import V2
from oracle import Oracle
from serving import PROMPT, Serve, assert_same, settings_of
from tiny import FAMILIES, VARIANTS, load_model, make_adapter

from lora_drop_vllm.cli.demo import BUNDLED_ADAPTER
from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Schedule, rows
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.method.adapter import load_tensors, read_config, save_adapter

pytestmark = pytest.mark.engine

TOKENS = 10 if V2 else 64
KS = (1, 3) if V2 else (1, 3, 7)
DROP = [3, 5]
# "The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n    if n <"
TEXT = [
    [504, 3575, 282, 4649, 314],
    [12615, 36411, 418, 253, 2779, 282],
    [1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 2067],
]
COMBINATIONS = [
    pytest.param(reuse, kv, injection, id=f"{reuse}-{kv}-{injection}")
    for injections in (("block", "attn_mlp"), ("attn",))
    for reuse in ("previous", "anchor", "update", "none")
    for kv in ("skip", "write")
    for injection in injections
]

TWO = ("update-skip-block", "previous-write-attn_mlp")
# families that it runs in one; Ministral 3 has YaRN, and vLLM's class is Mistral's
ONCE = {"llama3_rope": TWO[0], "qwen2_tied": TWO[0], "qwen3": TWO[1], "ministral3": TWO[1]}
EVERYWHERE = ("llama", "qwen2")  # families that `make test` runs in every setting
SLOW_IN_V2 = [pytest.mark.matrix] * V2
OF_ATTENTION = ("update-skip-attn", "previous-write-attn", "anchor-write-attn", "none-skip-attn")


def _in_ci(n: int, setting: str, family: str) -> bool:
    """What `make test` runs; `make test-matrix` runs the rest."""
    if family == "real":
        return setting in TWO and not V2
    if family not in EVERYWHERE:
        return setting == ONCE.get(family) and not V2
    ours = family == EVERYWHERE[n.bit_count() % 2]
    if setting.endswith("-attn"):
        return ours and setting in OF_ATTENTION[: 1 if V2 else None]
    return ours or not V2


def combinations(*families: str) -> list[Any]:
    """Every family in every setting, those outside `make test` marked."""
    return [
        pytest.param(
            family,
            *c.values,
            id=f"{family}-{c.id}",
            marks=() if _in_ci(n, str(c.id), family) else pytest.mark.matrix,
        )
        for family in families
        for n, c in enumerate(COMBINATIONS)
        if family in (*FAMILIES, "real") or c.id in TWO  # no setting knows of other variants
    ]


@pytest.mark.runners
@pytest.mark.parametrize(("family", "reuse", "kv", "injection"), combinations(*VARIANTS))
def test_tokens_and_logprobs_are_the_oracles(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    family: str,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    config, tensors = make_adapter(
        tmp_path, models[family], drop_layers=DROP, k=7, reuse=reuse, kv=kv, injection=injection
    )
    engine = serve(models[family], {"adapter": str(tmp_path)})
    for k in KS:
        (got,) = engine.generate([PROMPT], TOKENS, extra_args={"lora_drop_k": k})
        oracle = Oracle(hf_models[family], settings_of(config, tensors, k=k))
        want = oracle.decode(PROMPT, TOKENS)
        assert_same(got, want, oracle)
    full = sum(-(-TOKENS // (k + 1)) for k in KS)
    assert engine.counts() == {"full": full, "lora": len(KS) * TOKENS - full}


@pytest.mark.runners
@pytest.mark.parametrize(
    ("family", "reuse", "kv", "injection"),
    [
        pytest.param("llama", "update", "skip", "block", id="skip", marks=SLOW_IN_V2),
        pytest.param("qwen2", "previous", "write", "attn_mlp", id="write", marks=SLOW_IN_V2),
        pytest.param("qwen2", "update", "skip", "attn_mlp", id="gates", marks=pytest.mark.matrix),
        pytest.param("llama", "anchor", "write", "block", id="anchor", marks=pytest.mark.matrix),
    ],
)
def test_whole_layers_beside_attentions_give_the_oracles_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    family: str,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    """Layers 3 and 4 drop whole, in one run; the attention of 5 follows them."""
    config, tensors = make_adapter(
        tmp_path,
        models[family],
        drop_layers=[3, 4],
        drop_attention=[5],
        reuse=reuse,
        kv=kv,
        injection=injection,
    )
    engine = serve(models[family], {"adapter": str(tmp_path)})
    (got,) = engine.generate([PROMPT], TOKENS)
    oracle = Oracle(hf_models[family], settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, TOKENS), oracle)
    assert engine.counts()["lora"] == TOKENS - -(-TOKENS // 4)


@pytest.mark.model
def test_bf16_stays_close_until_a_tie(serve: Serve, real_model: Path, tmp_path: Path) -> None:
    config, tensors = make_adapter(tmp_path, real_model, drop_layers=list(range(10, 17)), r=16)
    tensors = {n: t * (0.05 if "lora_B" in n else 1) for n, t in tensors.items()}
    save_adapter(tmp_path, config, tensors)
    engine = serve(
        real_model, {"adapter": str(tmp_path)}, dtype="bfloat16", kv_cache_memory_bytes=1 << 28
    )
    model = load_model(real_model, torch.bfloat16)
    differences = []
    for prompt in TEXT:
        (got,) = engine.generate([prompt], 16)
        oracle = Oracle(model, settings_of(config, tensors))
        want = oracle.decode(prompt, 16)
        for n in range(16):
            if oracle.margins[n] < 0.1:
                break  # a legitimate tie: the two may part here
            assert got.tokens[n] == want[n]
            differences.append(abs(got.logprobs[n] - oracle.logprobs[n]))
    assert len(differences) >= 12, "too many ties: nothing was tested"
    # stock vLLM and Hugging Face differ by up to 0.17 in bf16 on this model and these prompts
    assert sum(differences) / len(differences) < 0.1
    assert max(differences) < 0.3


@pytest.mark.model
def test_a_trained_adapter_has_the_trainers_logits_when_served(
    serve: Serve, real_model: Path
) -> None:
    """The bundled adapter in bf16: what the engine says, teacher-forced through the trainer."""
    config = read_config(BUNDLED_ADAPTER)
    engine = serve(
        real_model,
        {"adapter": str(BUNDLED_ADAPTER)},
        dtype="bfloat16",
        kv_cache_memory_bytes=1 << 28,
    )
    adapter = Adapter(config, load_tensors(BUNDLED_ADAPTER, config))
    decoder = ForcedDecoder(load_model(real_model, torch.bfloat16), adapter)
    differences = []
    for prompt in TEXT:
        (got,) = engine.generate([prompt], 24)
        tokens = torch.tensor([prompt + got.tokens])
        schedule = Schedule.of(rows([tokens.numel()]), len(prompt), config.k)
        with torch.no_grad():
            logits = decoder.logits(decoder.hidden(tokens, schedule))[0, len(prompt) - 1 : -1]
        log_p = logits.float().log_softmax(-1).gather(1, torch.tensor(got.tokens)[:, None])[:, 0]
        differences += (log_p - torch.tensor(got.logprobs)).abs().tolist()
    assert engine.counts() == {"full": 3 * 6, "lora": 3 * 18}
    # bounds as in bf16 above: rounding alone
    assert sum(differences) / len(differences) < 0.1
    assert max(differences) < 0.4


def test_untrained_layers_pass_their_input_through(
    serve: Serve, models: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    settings = {"untrained": True, "drop_layers": DROP, "reuse": "none", "k": 3}
    engine = serve(models["llama"], settings)
    (got,) = engine.generate([PROMPT], TOKENS)
    d = hf_models["llama"].config.hidden_size
    zeros = {
        f"layers.{i}.lora_{m}.weight": torch.zeros(s)
        for i in DROP
        for m, s in (("A", (1, d)), ("B", (d, 1)))
    }
    from oracle import Settings

    oracle = Oracle(hf_models["llama"], Settings(DROP, 3, "none", "skip", "block", 1.0, zeros))
    assert got.tokens == oracle.decode(PROMPT, TOKENS)


@pytest.mark.model
@pytest.mark.parametrize(("family", "reuse", "kv", "injection"), combinations("real"))
def test_real_model_gives_the_oracles_tokens(
    serve: Serve,
    real_model: Path,
    tmp_path: Path,
    family: str,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    config, tensors = make_adapter(
        tmp_path,
        real_model,
        drop_layers=list(range(9, 22)),
        k=7,
        reuse=reuse,
        kv=kv,
        injection=injection,
        r=16,
    )
    engine = serve(real_model, {"adapter": str(tmp_path)}, kv_cache_memory_bytes=1 << 28)
    model = load_model(real_model)
    for k in KS:
        (got,) = engine.generate([PROMPT], TOKENS, extra_args={"lora_drop_k": k})
        oracle = Oracle(model, settings_of(config, tensors, k=k))
        assert_same(got, oracle.decode(PROMPT, TOKENS), oracle)


@pytest.mark.skipif(V2, reason="compiled only under V1: the interpreter cannot be compiled")
@pytest.mark.parametrize(
    ("reuse", "kv", "injection"),
    [
        pytest.param("update", "skip", "block", id="default"),
        # hard for a compiler: state written back, K and V written on the side
        pytest.param("previous", "write", "attn_mlp", id="hardest"),
    ],
)
def test_the_compiled_model_gives_the_oracles_tokens(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    config, tensors = make_adapter(
        tmp_path,
        models["llama"],
        drop_layers=[3, 4, 6],
        reuse=reuse,
        kv=kv,
        injection=injection,
    )
    engine = serve(models["llama"], {"adapter": str(tmp_path)}, enforce_eager=False)
    (got,) = engine.generate([PROMPT], TOKENS)
    oracle = Oracle(hf_models["llama"], settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, TOKENS), oracle)
    model = engine.runner.model
    assert not model.model.do_not_compile and not model.lora_step_model.do_not_compile
    assert engine.counts()["lora"] == TOKENS - TOKENS // 4
