"""The entry point `vllm.general_plugins`; vLLM calls it in every process, sometimes twice."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "lora_drop_vllm"


def register() -> None:
    """Registers the LoRA-Drop models and hooks up `--model-impl lora_drop`.

    Raises:
        RuntimeError: the installed vLLM is not the one this version was written for.
    """
    check_vllm_version()

    from vllm import ModelRegistry

    from lora_drop_vllm.engine.activation import ARCHITECTURES, install

    for name in set(ARCHITECTURES.values()):
        ModelRegistry.register_model(name, f"lora_drop_vllm.engine.models:{name}")
    install()


def check_vllm_version() -> None:
    """Raises unless the installed vLLM is in the range that pyproject.toml pins (extra `cuda`)."""
    from packaging.requirements import Requirement

    installed = metadata.version("vllm")
    pin = next(
        requirement
        for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ())
        if requirement.name == "vllm"
    )
    if not pin.specifier.contains(installed, prereleases=True):
        raise RuntimeError(
            f"lora_drop_vllm {metadata.version(DISTRIBUTION)} works with vllm{pin.specifier}, but "
            f"vllm {installed} is installed; install the matching vLLM or another version of "
            "lora_drop_vllm, or uninstall lora_drop_vllm."
        )
