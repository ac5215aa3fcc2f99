"""Environment, tiny models and engines for the tests.

Engines run in this process on the CPU. Which of vLLM's runners they use is the environment's
choice: `make test` runs the tests marked `runners` a second time with Model Runner V2 in Triton's
interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import environment  # first
import pytest
import tiny
import torch
from serving import Serve


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="all settings on the real model too")
    parser.addoption(
        "--effort", type=int, default=1, help="how many times the random trials of `make test`"
    )
    parser.addoption("--first-seed", type=int, default=0, help="where random trials start")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
        if item.get_closest_marker("engine") and not environment.HAVE_VLLM:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
        if item.get_closest_marker("matrix") and not config.getoption("--matrix"):
            item.add_marker(pytest.mark.skip(reason="a setting for `make test-matrix` only"))


class OnDemand(dict[str, Any]):
    """A dictionary that makes a value when it is first asked for."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self.make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self.make(name)
        return self[name]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def effort(request: pytest.FixtureRequest) -> int:
    """How many times the random trials of `make test` to run."""
    return int(request.config.getoption("--effort"))


@pytest.fixture(scope="session")
def first_seed(request: pytest.FixtureRequest) -> int:
    """The seed that random trials start from."""
    return int(request.config.getoption("--first-seed"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by their names in `tiny.VARIANTS`, made when first used."""
    root = tmp_path_factory.mktemp("models")
    return OnDemand(lambda name: tiny.make_model(root / name, name))


@pytest.fixture(scope="session")
def smooth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, whose layers add so little that they can be replaced."""
    folder = tiny.make_model(tmp_path_factory.mktemp("smooth") / "model", "llama")
    model = tiny.load_model(folder)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= 0.2
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_models(models: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """The same models as Hugging Face modules in fp32, for the oracle."""
    return OnDemand(lambda name: tiny.load_model(models[name]))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start engines in this process; the one at hand is shut down when the next starts."""
    server = Serve()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def dry(models: dict[str, Path]) -> Callable[..., Any]:
    """`dry(**setup)` starts an engine that keeps books in the place of a model."""
    pytest.importorskip("vllm")
    from dry_engine import DryEngine
    from dry_scheduler import Setup
    from support.load.dry_core import prepare

    config = prepare(models["llama"])
    plain: dict[str, Any] = dict(
        kv="skip",
        k=3,
        block_sizes=(3, 4),
        spare_blocks=30,
        max_model_len=32,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        long_prefill_token_threshold=0,
        async_scheduling=False,
        prefix_caching=True,
        policy="fcfs",
        prompts="wait",
        drops="drop_layers",
    )
    return lambda **setup: DryEngine(config, Setup(**(plain | setup)))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The real 135M Llama model, fetched once into the user's cache."""
    from lora_drop_vllm.cli.gguf_model import real_model

    return real_model()


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else real(name, *a),
    )
