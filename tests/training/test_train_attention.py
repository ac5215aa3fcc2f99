"""Adapters that drop attentions: training lowers the loss, and served they are what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from serving import PROMPT, Serve
from tiny import load_model
from training_runs import WORDS, tensors_of

from lora_drop_vllm.cli import main
from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Schedule, rows
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.method.adapter import read_config
from lora_drop_vllm.training.checkpoint import LOG

STEPS, TOKENS = 12, 16


@pytest.mark.engine
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--layers", "3", "--drop-attention", "4-5"], id="mixed"),
        pytest.param(["--rho", "0.5", "--injection", "attn"], id="attn", marks=pytest.mark.matrix),
        pytest.param(
            ["--rho", "0.5", "--injection", "attn", "--kv", "write", "--reuse", "previous"],
            id="attn-write-previous",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_what_is_trained_is_what_is_served(
    serve: Serve, smooth_model: Path, tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "corpus.txt").write_text(WORDS * 12)
    out = tmp_path / "adapter"
    command = ["train", str(smooth_model), "--corpus", str(tmp_path / "corpus.txt"), "--rank", "4"]
    command += ["--length", "48", "--steps", str(STEPS), "--batch", "2", "--warmup", "2"]
    command += ["--lr", "0.01", "--from", "zero", "--no-bf16", "--out", str(out)]
    assert main([*command, *flags]) == 0
    losses = [json.loads(line)["loss"] for line in (out / LOG).read_text().splitlines()]
    assert len(losses) == STEPS and sum(losses[-3:]) < 0.95 * sum(losses[:3])
    config, tensors = read_config(out), tensors_of(out)
    assert all(".attn." in name for name in tensors if not name.startswith("layers.3."))
    engine = serve(smooth_model, {"adapter": str(out)})
    (got,) = engine.generate([PROMPT], TOKENS)
    assert engine.counts() == {"full": TOKENS // 4, "lora": TOKENS - TOKENS // 4}
    decoder = ForcedDecoder(load_model(smooth_model), Adapter(config, tensors))
    tokens = torch.tensor([PROMPT + got.tokens])
    schedule = Schedule.of(rows([tokens.numel()]), len(PROMPT), config.k)
    with torch.no_grad():
        logits = decoder.logits(decoder.hidden(tokens, schedule))[0, len(PROMPT) - 1 : -1]
    log_p = logits.log_softmax(-1).gather(1, torch.tensor(got.tokens)[:, None])[:, 0]
    torch.testing.assert_close(log_p, torch.tensor(got.logprobs), atol=1e-3, rtol=0)
