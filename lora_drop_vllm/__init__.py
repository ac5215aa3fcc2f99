"""LoRA-Drop for vLLM: middle layers that do not run on most decode steps."""

__version__ = "0.1.0"
