"""Figures from the newest records of serve_latency.py.

python benchmarks/plots.py --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from support import plots, record


def main() -> None:
    """Draws what the newest records hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args()
    plots.require_matplotlib()
    given.out.mkdir(parents=True, exist_ok=True)
    for path in plots.draw(record.newest(), given.out):
        print(path)


if __name__ == "__main__":
    main()
