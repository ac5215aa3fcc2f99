"""Text that adapters are measured on."""

from __future__ import annotations

from pathlib import Path

from lora_drop_vllm.evaluation.tasks import read_text

WIKITEXT = "wikitext2_test.txt"  # name in records
MANUAL = "Python's manual"


def read(path: Path | None) -> tuple[str, str]:
    """Name for records, and text of a file; of the language manual that every Python carries.

    Raises:
        ValueError: the file cannot be read, is empty, or is not text.
    """
    if path:
        return path.name, read_text(path)
    from pydoc_data.topics import topics

    return MANUAL, "\n\n".join(topics[name] for name in sorted(topics))
