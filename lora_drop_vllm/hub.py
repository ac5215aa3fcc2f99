"""Adapters by name: a folder, or a repository of the Hugging Face Hub in that hub's local cache."""

from __future__ import annotations

import re
from pathlib import Path

from lora_drop_vllm.method.adapter import CONFIG_FILE, TENSOR_FILE
from lora_drop_vllm.method.adapter_folder import AdapterError

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, which is fetched into the hub's cache if it is a name.

    Args:
        adapter: a folder, `org/name` or `org/name@revision` (branch, tag or commit). A path that
            exists wins. huggingface_hub decides about cache, token and offline mode.

    Raises:
        AdapterError: it is a name, and the hub does not give the adapter.
    """
    path, name = Path(adapter), NAME.fullmatch(str(adapter))
    if name is None or path.exists():
        return path
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name[1], CONFIG_FILE, revision=name[2]))
        # cache/models--org--name/snapshots/COMMIT: both files from one commit
        hf_hub_download(name[1], TENSOR_FILE, revision=config.parent.name)
    except (OSError, ValueError) as error:  # of huggingface_hub and of the network
        raise AdapterError(
            f"lora_drop.adapter={str(adapter)!r}: no such folder, and no such adapter from the "
            f"Hugging Face Hub ({_reason(error)})."
        ) from error
    return config.parent


def _reason(error: Exception) -> str:
    """The hub's answer in one line, and the way out."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    ways_out = {
        GatedRepoError: "its owner must give access; then set HF_TOKEN",
        RevisionNotFoundError: "there is no such revision; use a branch, tag or commit",
        RepositoryNotFoundError: "there is no such repository; a private one needs HF_TOKEN",
        LocalEntryNotFoundError: (
            f"it is not in the cache {HF_HUB_CACHE}, and the hub cannot be reached or "
            "HF_HUB_OFFLINE=1; download it where there is a network, or give a folder"
        ),
        EntryNotFoundError: f"it has no {CONFIG_FILE} or no {TENSOR_FILE}",
    }
    told = [text for kind, text in ways_out.items() if isinstance(error, kind)]
    return told[0] if told else str(error).partition("\n")[0]
