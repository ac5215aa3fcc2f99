"""Files that are there as a whole or not at all, also when the disk is full or a write is cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write; it takes the place of `path` when the block ends well, else it goes.

    Raises:
        RuntimeError: it could not be written; `path` is what it was.
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
    """Add a line to a file.

    Raises:
        RuntimeError: it could not be written; the file has its old lines only.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        raise RuntimeError(f"{path}: could not be written ({error})") from error
