"""The base model and its tokenizer, from a folder or the local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def open_model(model: str) -> tuple[Any, Any]:
    """Model and tokenizer: on a GPU in the model's own dtype, on the CPU in fp32.

    Args:
        model: folder, or a name in the local Hugging Face cache

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    base: Any
    try:
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto" if cuda else torch.float32)
        return base.to("cuda" if cuda else "cpu"), AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"{model}: no such model folder, nor one in the local cache") from error


def model_name(model: str) -> str:
    """What an adapter calls its base model: the name of a folder, or the name in the cache."""
    return Path(model).resolve().name if Path(model).is_dir() else model
