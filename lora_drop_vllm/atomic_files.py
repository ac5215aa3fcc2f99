"""Files written in full or not at all, even if the disk fills up or the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_file(flag: str, path: Path) -> None:
    """Raises ValueError unless a file can be written at a path, before the work that fills it."""
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written; name another file")


def check_folder(flag: str, path: Path) -> None:
    """Raises ValueError unless a folder can be made or written at a path, before the work."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{flag} {path}: {nearest} is no folder that can be written; name another")


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
