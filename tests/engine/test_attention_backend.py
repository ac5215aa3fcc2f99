"""Which attention backend serves `kv: skip`, and in which layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import V2
from oracle import Oracle
from serving import PROMPT, Serve, assert_same, settings_of
from tiny import make_adapter

attention_backends = pytest.importorskip("attention_backends")
pytestmark = pytest.mark.engine

DROP, TOKENS = [3, 4, 6], 10


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    from vllm.v1.attention.selector import _cached_get_attn_backend

    yield
    _cached_get_attn_backend.cache_clear()


def served_as_the_oracle(
    serve: Serve, model: Path, hf_model: Any, adapter: Path, **args: Any
) -> Any:
    """An engine, after one request whose tokens were the oracle's."""
    config, tensors = make_adapter(adapter, model, drop_layers=DROP)
    engine = serve(model, {"adapter": str(adapter)}, **args)
    (got,) = engine.generate([PROMPT], TOKENS)
    oracle = Oracle(hf_model, settings_of(config, tensors))
    assert_same(got, oracle.decode(PROMPT, TOKENS), oracle)
    return engine


def test_vllms_choice_gives_way_to_one_that_fits(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lora_drop_vllm.engine import attention

    said: list[str] = []
    monkeypatch.setattr(attention.logger, "info", lambda text, *args: said.append(text % args))
    backends = {None: attention_backends.FIXED, "TRITON_ATTN": attention_backends.CPU}
    attention_backends.offer(monkeypatch, backends)
    engine = served_as_the_oracle(serve, models["llama"], hf_models["llama"], tmp_path)
    assert engine.runner.vllm_config.attention_config.backend.name == "TRITON_ATTN"
    chosen = "LoRA-Drop attention backend: TRITON_ATTN instead of vLLM's choice"
    assert sum(line.startswith(chosen) for line in said) == 1
    assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == 2


def test_a_backend_that_fits_stays_vllms_choice(serve: Serve, models: dict[str, Path]) -> None:
    engine = serve(models["llama"], {"untrained": True, "drop_layers": DROP})
    assert engine.runner.vllm_config.attention_config.backend is None


def test_a_backend_that_the_user_named_is_refused(
    serve: Serve, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = {
        "FLASHINFER": attention_backends.FIXED,
        None: attention_backends.CPU,
        "TRITON_ATTN": attention_backends.CPU,
    }
    attention_backends.offer(monkeypatch, backends)
    settings = {"untrained": True, "drop_layers": DROP}
    with pytest.raises(ValueError, match=r"supports only KV blocks of \[32, 64\] tokens"):
        serve(models["llama"], settings, attention_backend="FLASHINFER")


def declares(*names: str) -> Any:
    """A backend of any block size with these layouts; without names, of any layout."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layouts = tuple(KVCacheLayout[name] for name in names) or None

    class Declares(TritonAttentionBackend):
        @classmethod
        def supported_kv_cache_layouts(cls) -> Any:
            return layouts

    return Declares


@pytest.mark.parametrize(
    ("declared", "packed"),
    [
        pytest.param((), ("BLNHC", "BLHNC"), id="any: stock vLLM's order of tokens and heads"),
        pytest.param(("LBHNC", "BLHNC"), ("BLHNC",), id="heads first"),
        pytest.param(("LBNHC",), (), id="layers outermost only"),
    ],
)
def test_layouts(declared: tuple[str, ...], packed: tuple[str, ...]) -> None:
    from lora_drop_vllm.engine import attention

    backend = declares(*declared)
    assert tuple(layout.name for layout in attention._packed_layouts(backend)) == packed
    if not packed:
        with pytest.raises(ValueError, match=r"supports only the KV layouts \['LBNHC'\]"):
            attention._block_unit(backend)


@pytest.mark.runners
@pytest.mark.skipif(not V2, reason="Triton's attention needs the interpreter")
def test_tritons_attention_reads_compacted_lists(
    serve: Serve,
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention_backends.offer(monkeypatch, {None: attention_backends.TRITON})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    engine = served_as_the_oracle(serve, models["llama"], hf_models["llama"], tmp_path)
    assert engine.runner.vllm_config.cache_config.kv_cache_layout == "BLNHC"
    assert engine.counts()["lora"] > 0
