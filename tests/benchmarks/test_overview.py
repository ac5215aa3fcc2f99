"""The README's table and picture."""

from __future__ import annotations

import pytest
from support import overview, quality_records, texts


def test_the_readme_compares_adapters_on_the_same_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later record on more windows or another text does not replace the one that compares."""
    few, many, manual = (
        {"settings": {"adapter": "made/here", "windows": windows, "text": text}, "utc": utc}
        for utc, (windows, text) in enumerate(
            [
                (quality_records.WINDOWS, texts.WIKITEXT),
                (64, texts.WIKITEXT),
                (quality_records.WINDOWS, texts.MANUAL),
            ]
        )
    )
    monkeypatch.setattr(quality_records.record, "newest", lambda *_: [few, many, manual])
    assert overview._trained("here") is few
    assert quality_records.finished() == [few, many]
    assert quality_records.finished(text=texts.MANUAL) == [manual]
