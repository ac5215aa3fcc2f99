"""Quality records by what was measured: adapters fitted alike, and finished ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import record
from support.texts import WIKITEXT

Record = dict[str, Any]

WINDOWS = 16  # of the text, in every figure that stands beside another adapter's

# the settings of a fitted adapter unless a table varies them
PLAIN = {"layers": "contiguous", "rank": 16, "reuse": "update", "kv": "skip"}
PLAIN |= {"injection": "block", "tokens": 8192, "windows": WINDOWS}
PLAIN |= {"text": WIKITEXT}


def fitted(**wanted: Any) -> list[Record]:
    """Newest records of adapters in closed form with these settings, and `PLAIN` for all others.

    A setting wanted as None may have any value.
    """
    return [r for r in _closed_form(PLAIN | wanted) if "drop_attention" not in r["settings"]]


def chosen(**wanted: Any) -> list[Record]:
    """The same for adapters whose drop layers were given by number, as `lora-drop profile` says."""
    found = _closed_form(PLAIN | {"layers": None, "rho": None} | wanted)
    of_numbers = [r for r in found if isinstance(r["settings"]["layers"], list)]
    return [r for r in of_numbers if "drop_attention" not in r["settings"]]


def mixed(**wanted: Any) -> list[Record]:
    """The same for adapters of which some layers drop only their attention, by number."""
    conditions = PLAIN | {"layers": None} | wanted
    return [r for r in _closed_form(conditions) if "drop_attention" in r["settings"]]


def _closed_form(wanted: dict[str, Any]) -> list[Record]:
    conditions = {name: value for name, value in wanted.items() if value is not None}
    return [
        r
        for r in record.newest("quality")
        if "adapter" not in r["settings"]
        and all(r["settings"][name] == value for name, value in conditions.items())
    ]


def finished(windows: int | None = None, text: str = WIKITEXT) -> list[Record]:
    """Newest records of adapters that were measured as they lie in `adapters/`.

    Args:
        windows: only those on as many windows of the text; None: all
        text: its name in the records
    """
    found = [r for r in record.newest("quality") if "adapter" in r["settings"]]
    found = [r for r in found if r["settings"]["text"] == text]
    return [r for r in found if windows in (None, r["settings"]["windows"])]


def adapter_name(folder: Path) -> str:
    """Name of an adapter in records: its folder, and the one around it."""
    return f"{folder.parent.name}/{folder.name}"


def adapter(r: Record) -> str:
    """Name of a record's adapter in tables: that of its folder alone."""
    return str(r["settings"]["adapter"]).split("/")[-1]


def chats() -> list[Record]:
    """The last record of answers to all chat prompts, of each adapter."""
    return last_of_each([r for r in record.newest("chat") if r["settings"]["limit"] is None])


def last_of_each(records: Sequence[Record]) -> list[Record]:
    """The last record of each adapter, by name."""
    by_time = sorted(records, key=lambda r: r["utc"])
    last = {r["settings"]["adapter"]: r for r in by_time}
    return [last[name] for name in sorted(last)]
