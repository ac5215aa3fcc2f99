"""Switched off, LoRA-Drop is vLLM bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import Serve
from tiny import prompt_of

pytestmark = pytest.mark.engine

PROMPTS = [prompt_of(n) for n in (5, 40, 150)]
COUNT = 24


@pytest.fixture(scope="module")
def stock(models: dict[str, Path]) -> list[Any]:
    """Tokens and log-probabilities of vLLM in a process that does not load the plugin."""
    script = (
        "import json, sys\n"
        "from serving import Serve\n"
        "serve = Serve()\n"
        "engine = serve(sys.argv[1])\n"
        "got = engine.generate(json.loads(sys.argv[2]), int(sys.argv[3]))\n"
        "from vllm.config import VllmConfig\n"
        "hooked = hasattr(VllmConfig.try_verify_and_update_config, 'lora_drop')\n"
        "print(json.dumps([hooked, [[g.tokens, g.logprobs] for g in got]]))\n"
        "serve.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(models["llama"]), json.dumps(PROMPTS), str(COUNT)],
        env=os.environ
        | {"VLLM_PLUGINS": "none", "PYTHONPATH": str(Path(__file__).parents[1] / "support")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("[false"))
    return json.loads(line)[1]


@pytest.mark.parametrize(
    "settings",
    [None, {"untrained": True, "k": 0}, {"untrained": True, "rho": 0}],
    ids=["installed but unused", "k=0", "rho=0"],
)
def test_tokens_and_logprobs_are_stock_vllms(
    serve: Serve, models: dict[str, Path], stock: list[Any], settings: Any
) -> None:
    engine = serve(models["llama"], settings)
    got = engine.generate(PROMPTS, COUNT)
    assert [[g.tokens, g.logprobs] for g in got] == stock
    assert type(engine.scheduler).__module__.startswith("vllm.")


def test_a_request_with_k_0_gets_the_stock_models_tokens(
    serve: Serve, models: dict[str, Path], stock: list[Any]
) -> None:
    engine = serve(models["llama"], {"untrained": True, "rho": 0.5})
    got = engine.generate(PROMPTS, COUNT, extra_args={"lora_drop_k": 0})
    assert [g.tokens for g in got] == [tokens for tokens, _ in stock]
    assert engine.counts()["lora"] == 0
