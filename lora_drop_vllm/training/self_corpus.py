"""`--corpus self`: what the model itself says, written once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from lora_drop_vllm.cache import default_cache
from lora_drop_vllm.decode.pretrained import model_digest, model_name
from lora_drop_vllm.training.conversations import Generation
from lora_drop_vllm.training.generate import COUNT
from lora_drop_vllm.training.generated_file import documents_in

SELF = "self"


def self_corpus(model: str) -> Path:
    """A model's own conversations; `lora-drop generate` writes them on the first call.

    It runs in a process of its own, so that nothing of the engine stays in this one's memory.

    Raises:
        ValueError: several processes want them and there are none yet.
        RuntimeError: they could not be written.
    """
    path = self_path(model)
    if (have := documents_in(path)) < COUNT:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"--corpus self: {path} is not written yet, and several processes would write it; "
                f"run `lora-drop generate {model} --out {path}` first"
            )
        say(f"--corpus self: the model writes {COUNT} conversations to {path}, once")
        command = [sys.executable, "-m", "lora_drop_vllm.cli", "generate", model]
        command += ["--out", str(path), "--count", str(COUNT)]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise RuntimeError(
                f"--corpus self: `{' '.join(command[1:])}` failed, see above; run it again to "
                "resume, or name another corpus"
            )
    else:
        say(f"--corpus self: {have} conversations that the model wrote, in {path}")
    return path


def self_path(model: str) -> Path:
    """Where they are kept: a file for each model, its weights and the settings that wrote them."""
    settings = json.dumps(asdict(Generation())).encode()
    key = f"{model_digest(model)}-{hashlib.sha256(settings).hexdigest()[:6]}"
    return default_cache() / SELF / f"{model_name(model).replace('/', '--')}-{key}.jsonl"


def say(what: str) -> None:
    """Tell the user, beside the progress."""
    print(what, file=sys.stderr, flush=True)
