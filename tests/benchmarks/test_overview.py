"""The README's table and picture."""

from __future__ import annotations

import pytest
from support import overview, quality_records


def test_the_readme_compares_adapters_on_the_same_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later record on more windows does not take the place of the one that compares."""
    few, many = (
        {"settings": {"adapter": "made/here", "windows": windows}, "utc": str(windows)}
        for windows in (quality_records.WINDOWS, 64)
    )
    monkeypatch.setattr(quality_records.record, "newest", lambda *_: [few, many])
    assert overview._trained("here") is few
    assert quality_records.finished() == [few, many]
