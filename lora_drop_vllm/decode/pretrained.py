"""The base model and its tokenizer, from a folder or the local cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

FILES = (".json", ".jinja", ".safetensors", ".bin", ".model")  # what decides a model's answers
SLICE, SLICES = 1 << 16, 16  # bytes of a large file that its digest reads


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


def model_digest(model: str) -> str:
    """Twelve hex digits that tell a model from others: of its files' names, sizes and bytes.

    Of large files sixteen slices are read; other weights differ in all of them.

    Raises:
        ValueError: there is no such model.
    """
    digest = hashlib.sha256()
    for path in sorted(_folder(model).iterdir()):
        if path.suffix not in FILES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= SLICES * SLICE:
                digest.update(file.read())
                continue
            for n in range(SLICES):
                file.seek(n * (size - SLICE) // (SLICES - 1))
                digest.update(file.read(SLICE))
    return digest.hexdigest()[:12]


def _folder(model: str) -> Path:
    """Where a model's files are."""
    from transformers.utils import cached_file

    try:
        found = cached_file(model, "config.json", local_files_only=True)
    except OSError as error:
        raise ValueError(f"{model}: no such model folder, nor one in the local cache") from error
    return Path(str(found)).parent


def context_length(model: str) -> int:
    """Positions that a model was made for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(_folder(model)).get_text_config()
    return int(config.max_position_embeddings)
