"""Tiny models and random adapters, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel, save_adapter
from lora_drop_vllm.method.layers import eligible_layers

VOCAB = 512
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "ministral3")
ROPE = {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 256}
LLAMA3_ROPE = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = {"original_max_position_embeddings": 16}
YARN = ROPE | {"rope_type": "yarn"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name of the classes, settings
    "llama": ("Llama", {}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 64}),  # the heads are wider than the stream
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 32,
            # larger ones make softmax so steep that one rounding changes log-probabilities by 1e-3
            "rope_parameters": YARN | SHORT | {"factor": 128.0, "llama_4_scaling_beta": 0.1},
            "llama_4_scaling": SHORT | {"beta": 0.1},  # the same where vLLM looks for it
        },
    ),
}


def make_model(folder: Path, family: str, num_layers: int = 8) -> Path:
    """Saves a random model whose argmax is far from ties; returns its folder."""
    import transformers

    torch.manual_seed(7)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    name, changes = VARIANTS[family]
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter, value in model.named_parameters():
        if parameter.endswith("proj.bias"):  # a bias of zero would test nothing
            torch.nn.init.normal_(value, std=0.5)
        elif "_norm." in parameter:  # nor a norm of Qwen3's queries and keys of one
            torch.nn.init.normal_(value, mean=1.0, std=0.5)
    model.save_pretrained(folder)
    return folder


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens, the same for the same arguments."""
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def make_tokenizer() -> Any:
    """A tokenizer of single bytes, numbered from 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: 3 + n for n, c in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a folder, for the oracle."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(
    folder: Path,
    model: Path,
    *,
    drop_layers: list[int],
    k: int = 3,
    reuse: str = "update",
    kv: str = "skip",
    injection: str = "block",
    drop_attention: list[int] | None = None,
    r: int = 4,
    seed: int = 0,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Saves a random adapter with non-zero B and uneven gates; returns its config and tensors.

    With the injection `mixed`, the last of the drop layers drops only its attention.
    """
    if injection == "mixed":
        injection, drop_layers, drop_attention = "block", drop_layers[:-1], drop_layers[-1:]
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(model)
    config = AdapterConfig(
        base_model_name_or_path=str(model),
        base_model=BaseModel.of(base),
        r=r,
        lora_alpha=2.0 * r,
        rho=(len(drop_layers) + len(drop_attention or []))
        / len(eligible_layers(base.num_hidden_layers)),
        k=k,
        drop_layers=drop_layers,
        reuse=reuse,
        kv=kv,
        injection=injection,
        drop_attention=drop_attention or [],
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.sites.shapes().items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("gate"):
            tensors[name] = 0.7 + 0.2 * value
        else:
            tensors[name] = value * (0.5 / shape[-1] ** 0.5)
    save_adapter(folder, config, tensors)
    return config, tensors
