"""Files written in full or not at all, even if the disk fills up or the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Path of a new file to write; it replaces `path` if the block succeeds, else it is deleted.

    Raises:
        RuntimeError: the file could not be written; `path` is unchanged.
    """
    from safetensors import SafetensorError

    scratch = path.with_name(f"{path.name}.new")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{path}: could not be written ({error})") from error
    finally:
        scratch.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file.

    Raises:
        RuntimeError: the line could not be written; the file has its old lines only.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        raise RuntimeError(f"{path}: could not be written ({error})") from error
