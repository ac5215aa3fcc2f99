"""The base model and its tokenizer, from a folder or from the local cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

FILES = (".json", ".jinja", ".safetensors", ".bin", ".model")  # files that decide a model's answers
SLICE, SLICES = 1 << 16, 16  # bytes of a large file that its digest reads


def open_model(model: str) -> tuple[Any, Any]:
    """Model and tokenizer: on a GPU in the model's own dtype, on the CPU in fp32.

    Args:
        model: folder, or a name in the local Hugging Face cache

    Raises:
        ValueError: the model does not exist, cannot be read, or is quantized.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    base: Any
    try:
        if getattr(AutoConfig.from_pretrained(model), "quantization_config", None):
            raise ValueError(
                f"{model}: is quantized; take the model that it was made from, whose adapters "
                "serve the quantized one too"
            )
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto" if cuda else torch.float32)
        return base.to("cuda" if cuda else "cpu"), AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise _unreadable(model, error) from error
    except SafetensorError as error:
        raise ValueError(f"{model}: its weights cannot be read ({error})") from error


def _unreadable(model: str, error: OSError) -> ValueError:
    if Path(model).is_dir():
        return ValueError(f"{model}: cannot be read ({str(error).strip().splitlines()[0]})")
    return ValueError(f"{model}: no such model folder, nor one in the local cache")


def model_name(model: str) -> str:
    """The name of a base model in an adapter: its folder's name, or its name in the cache."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def model_digest(model: str) -> str:
    """Twelve hex digits that identify a model, from its files' names, sizes and bytes.

    The digest reads sixteen slices of a large file; other weights differ in every slice.

    Raises:
        ValueError: the model does not exist.
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
    """The folder that holds a model's files."""
    from transformers.utils import cached_file

    try:
        found = cached_file(model, "config.json", local_files_only=True)
    except OSError as error:
        raise _unreadable(model, error) from error
    return Path(str(found)).parent


def context_length(model: str) -> int:
    """The number of positions that a model supports."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(_folder(model)).get_text_config()
    return int(config.max_position_embeddings)
