"""Files from strangers: where links in an adapter folder may lead, and strict JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 1 << 20


class AdapterError(ValueError):
    """An adapter folder that cannot be used; the message says why, and the way out."""


def read_json(path: Path) -> Any:
    """Reads a small JSON file in which no object has a key twice.

    Raises:
        AdapterError: it cannot be read, is too large, or is not such JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error}).") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; not a config.")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:  # a number too long is a ValueError too
        raise AdapterError(f"{path}: not valid JSON ({error}).") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def file_in(folder: Path, name: str) -> Path | None:
    """The file of that name in an adapter folder, after links; None if it does not exist.

    A link must stay inside the folder. The only exception is a Hugging Face cache, which stores
    each file of `snapshots/REVISION/` in `blobs/`, beside `snapshots/`.

    Raises:
        AdapterError: a link leads elsewhere, or the path cannot be followed.
    """
    try:
        root, path = folder.resolve(), (folder / name).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, circular links
        raise AdapterError(
            f"lora_drop.adapter={shown(str(folder))}: {name} cannot be read ({error})."
        ) from error
    snapshots = next((p for p in root.parents if p.name == "snapshots"), None)
    homes = [root] if snapshots is None else [root, snapshots.parent / "blobs"]
    if not any(path.is_relative_to(home) for home in homes):
        raise AdapterError(
            f"lora_drop.adapter={str(folder)!r}: {name} is a link out of the folder, to {path}; "
            "put the file itself there."
        )
    return path if is_file else None


def shown(value: Any) -> str:
    """Any value of a user as an error message shows it, in at most 200 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        return f"<a {type(value).__name__} too large to print>"
    return text if len(text) <= 200 else f"{text[:200]}…"
