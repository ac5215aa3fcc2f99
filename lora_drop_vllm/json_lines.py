"""Lines of JSON files that come from anywhere."""

from __future__ import annotations

import json
from typing import Any


def parse(line: str | bytes) -> Any:
    """The value of a line of JSON.

    Raises:
        json.JSONDecodeError: it is no JSON.
        UnicodeError: it is not UTF-8, or an escape holds half a surrogate pair.
    """
    value = json.loads(line)
    if (b"\\u" in line) if isinstance(line, bytes) else ("\\u" in line):
        json.dumps(value, ensure_ascii=False).encode()
    return value
