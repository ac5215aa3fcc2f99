"""The families of models that LoRA-Drop runs: one row each.

Server, trainer and evaluator read this table. docs/architecture.md says how to add a family.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    Attributes:
        model_type: in `config.json`
        name: in `architectures` of `config.json`, before `ForCausalLM`
        vllm: the same, of the classes that run it in vLLM; None: it has its own
    """

    model_type: str
    name: str
    vllm: str | None = None

    @property
    def architecture(self) -> str:
        """The architecture in `config.json`."""
        return f"{self.name}ForCausalLM"

    @property
    def vllm_name(self) -> str:
        """What vLLM's names of its classes begin with."""
        return self.vllm or self.name

    @property
    def served(self) -> str:
        """The class in `engine/models.py` that serves it."""
        return f"LoRADrop{self.vllm_name}ForCausalLM"


FAMILIES = (
    Family("llama", "Llama"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("mistral", "Mistral"),
    Family("ministral3", "Ministral3", vllm="Mistral"),
)
