"""LoRA-Drop for vLLM: middle layers that do not run on most decode steps.

The public names are imported when they are first used, so that importing the package imports
neither torch nor vLLM. `docs/api.md` has an example of each.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_drop_vllm.cli.check import CheckResult as CheckResult
    from lora_drop_vllm.cli.check import check as check
    from lora_drop_vllm.cli.cost import CostResult as CostResult
    from lora_drop_vllm.cli.cost import cost as cost
    from lora_drop_vllm.evaluation.evaluate import evaluate as evaluate
    from lora_drop_vllm.evaluation.report import EvaluateResult as EvaluateResult
    from lora_drop_vllm.evaluation.served_answers import Decoding as Decoding
    from lora_drop_vllm.training.fit import FitResult as FitResult
    from lora_drop_vllm.training.fit import fit as fit
    from lora_drop_vllm.training.gradient import Plan as Plan
    from lora_drop_vllm.training.profiler import ProfileResult as ProfileResult
    from lora_drop_vllm.training.profiler import profile as profile
    from lora_drop_vllm.training.settings import Settings as Settings
    from lora_drop_vllm.training.trainer import TrainResult as TrainResult
    from lora_drop_vllm.training.trainer import train as train

__version__ = "0.1.0"

_MODULES = {  # the same names, for the interpreter; tests/test_api.py compares the two lists
    "CheckResult": "cli.check",
    "CostResult": "cli.cost",
    "Decoding": "evaluation.served_answers",
    "EvaluateResult": "evaluation.report",
    "FitResult": "training.fit",
    "Plan": "training.gradient",
    "ProfileResult": "training.profiler",
    "Settings": "training.settings",
    "TrainResult": "training.trainer",
    "check": "cli.check",
    "cost": "cli.cost",
    "evaluate": "evaluation.evaluate",
    "fit": "training.fit",
    "profile": "training.profiler",
    "train": "training.trainer",
}
__all__ = [*_MODULES]

if not TYPE_CHECKING:  # a type checker would take every name for a public one

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
