"""What is lost if LoRA steps are exact, against the Hugging Face model with masked keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from support.exact_steps import ExactLoraSteps
from torch import Tensor

from lora_drop_vllm.decode.positions import Schedule, rows
from lora_drop_vllm.decode.trainable import Adapter

PROMPT, LENGTH, K, DROP = 6, 22, 3, [2, 3, 5]


def hidden_of(model: Any, tokens: Tensor, masks: dict[int, Tensor]) -> Tensor:
    """The normed stream, with another mask of keys in some layers."""
    hooks = [
        model.model.layers[i].self_attn.register_forward_pre_hook(
            lambda _, args, given, mask=mask: (args, given | {"attention_mask": mask}),
            with_kwargs=True,
        )
        for i, mask in masks.items()
    ]
    with torch.no_grad():
        found: Tensor = model.model(tokens).last_hidden_state
    for hook in hooks:
        hook.remove()
    return found


def test_full_positions_miss_the_keys_of_lora_steps_in_drop_layers_alone(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.load_model(models["llama"])
    config, tensors = tiny.make_adapter(tmp_path / "a", models["llama"], drop_layers=DROP, k=K)
    decoder = ExactLoraSteps(model, Adapter(config, tensors))
    tokens = torch.tensor([tiny.prompt_of(LENGTH)])
    with torch.no_grad():
        found, base = decoder.hidden_and_base(tokens, Schedule.of(rows([LENGTH]), PROMPT, K))

    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    lora = [t for t in range(PROMPT, LENGTH) if (t - PROMPT) % (K + 1) < K]
    for query in set(range(LENGTH)) - set(lora):
        mask[query, [key for key in lora if key < query]] = float("-inf")
    expected = hidden_of(model, tokens, dict.fromkeys(DROP, mask[None, None]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    torch.testing.assert_close(base, hidden_of(model, tokens, {}), atol=1e-4, rtol=1e-4)
    refresh = PROMPT + K
    torch.testing.assert_close(found[:, :refresh], base[:, :refresh], atol=1e-4, rtol=1e-4)
    assert (found[:, refresh] - base[:, refresh]).abs().max() > 0.1  # the holes do matter
