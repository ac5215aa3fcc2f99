"""The tests' process: offline, a single process, interpreted Triton if there is no GPU.

It must be imported before vLLM or a kernel.
"""

from __future__ import annotations

import importlib.util
import os
import types

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
# the tests compare fp32 attention with an fp32 oracle; Triton would use tf32, which is 1e-3 off
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
HAVE_VLLM = importlib.util.find_spec("vllm") is not None

if V2 and not torch.cuda.is_available():
    # Triton has no CPU backend; its interpreter needs one to be listed as active
    import triton.backends

    active = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=active, compiler=None)
