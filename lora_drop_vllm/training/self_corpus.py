"""`--corpus self`: the model's own text, written once and kept in the user's cache."""

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
from lora_drop_vllm.generation.conversations import USER_TURNS, Generation
from lora_drop_vllm.generation.generate import COUNT
from lora_drop_vllm.generation.generated_file import documents_in

SELF = "self"


def self_corpus(model: str) -> Path:
    """The file of a model's own conversations; the first call runs `lora-drop generate` for it.

    That runs in a process of its own, so that no engine memory remains in this process.

    Raises:
        ValueError: several processes need the file, but it does not exist yet.
        RuntimeError: the conversations could not be written.
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
        if subprocess.run(command, stdout=2).returncode:  # 2: sys.stderr may be no file
            raise RuntimeError(
                f"--corpus self: `{' '.join(command[1:])}` failed, see above; run it again to "
                "resume, or name another corpus"
            )
    else:
        say(f"--corpus self: {have} conversations that the model wrote, in {path}")
    return path


def self_path(model: str) -> Path:
    """The cache file for a model's conversations; weights and settings are part of its name."""
    settings = json.dumps(asdict(Generation()) | USER_TURNS).encode()
    key = f"{model_digest(model)}-{hashlib.sha256(settings).hexdigest()[:6]}"
    return default_cache() / SELF / f"{model_name(model).replace('/', '--')}-{key}.jsonl"


def say(what: str) -> None:
    """Prints a line for the user, beside the progress bar."""
    print(what, file=sys.stderr, flush=True)
