"""GPU compilation of a model, on a CPU.

vLLM's CPU platform turns its own backend (`VLLM_COMPILE`) into one plain trace. Here the platform
keeps the mode, so the model passes all stages of a GPU: the graph split at attention, one Inductor
graph per piece, the post-grad passes, and the cache on disk. Only CUDA graphs are left out.
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

_LIBRARIES: list[Any] = []  # operators live as long as their library


def keep_vllm_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines that start from now on compile as on a GPU."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    platform.import_kernels()
    _declare_what_the_passes_name()
    update = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        kept = {
            name: getattr(compilation, name)
            for name in ("mode", "backend", "ir_enable_torch_wrap", "inductor_compile_config")
        }
        kept["inductor_compile_config"] = dict(kept["inductor_compile_config"])
        update(cls, vllm_config)
        for name, value in kept.items():
            setattr(compilation, name, value)
        compilation.compile_sizes = []  # as if the platform computed graph sizes

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))


def own_cache(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Let vLLM cache compiled graphs here, but keep what it knows of model classes (20 s)."""
    from vllm import envs

    known = Path(envs.VLLM_CACHE_ROOT) / "modelinfos"
    if known.exists():
        shutil.copytree(known, root / known.name)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(root))


def _declare_what_the_passes_name() -> None:
    """Declares the CUDA operators that a pass compares with; CPU builds lack them."""
    from vllm.compilation.passes.utility import fix_functionalization

    if _LIBRARIES:
        return
    library = torch.library.Library("_C", "FRAGMENT")
    _LIBRARIES.append(library)
    named = re.findall(r"torch\.ops\._C\.(\w+)\.default", inspect.getsource(fix_functionalization))
    for name in set(named):
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}() -> ()")
