"""Chat templates of three families, and a tiny model that writes letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

CHATML = """{%% for m in messages %%}{%% if loop.first and m.role != 'system' %%}<|im_start|>system
%s<|im_end|>
{%% endif %%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant
{%% endif %%}"""
TEMPLATES = {
    "smollm2": CHATML % "You are SmolLM.",
    "qwen2": CHATML % "You are a helpful assistant.",
    "llama3": """<|begin_of_text|>{% for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
    "bracketed": """{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- elif m.role == 'assistant' %} {{ m.content }}</s>
{%- else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}""",
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>")  # fmt: skip


def make_chat_tokenizer(family: str) -> Any:
    """A tokenizer of single bytes and the families' special tokens, with one family's template."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATES[family]
    tokenizer.eos_token = {"llama3": "<|eot_id|>", "bracketed": "</s>"}.get(family, "<|im_end|>")
    return tokenizer


def make_chat_model(folder: Path, family: str, template: str | None = None) -> Path:
    """Saves a random model that writes letters, spaces and the end of a turn; returns its folder.

    Channel 0 of its stream is held at a constant, by which the output layer refuses other tokens.
    """
    tokenizer = make_chat_tokenizer(template or family)
    if template is None and family == "llama":
        tokenizer.chat_template = None
    letters = tokenizer("etaoinshrdlucmfwypvbgk" + " " * 6, add_special_tokens=False).input_ids
    tiny.make_model(folder, family)
    model = tiny.load_model(folder)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= 0.2
            projection.weight.data[0] = 0.0
    model.model.embed_tokens.weight.data[:, 0] = 5.0
    bias = torch.full((tiny.VOCAB,), -30.0)
    bias[letters] = 0.0
    bias[tokenizer.eos_token_id] = -2.0
    model.lm_head.weight.data[:, 0] = bias
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
