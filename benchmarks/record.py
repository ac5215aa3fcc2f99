"""Renders the newest records into README.md and docs/results.md, as tables and pictures.

python benchmarks/record.py                renders
python benchmarks/record.py --repeats      says how far repeated runs agree
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from support import overview, overview_plot, plots, record, tables
from support.load import picture as load_picture
from support.load import tables as load_tables

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PICTURE = ROOT / "docs" / "speed_over_kl.png"
LOAD_PICTURE = ROOT / "docs" / "load.png"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def repeats() -> str:
    """Speed-ups that were measured more than once on one commit, and how far they lie apart."""
    lines = []
    for records in record.by_settings("commit"):
        speeds = record.speed_ups(records)
        if len(speeds) > 1:
            spread = max(speeds) / min(speeds) - 1
            name, *setting = tables.TABLES[records[0]["benchmark"]][1](records[0])[0][:3]
            runs = ", ".join(f"{speed:.3f}" for speed in speeds)
            lines.append(f"{name}, {', '.join(setting)}: {runs}; {spread:.1%} apart")
    return "\n".join(lines) or "no setting was measured twice on one commit"


def rendered(page: Path) -> str:
    """A page with its tables as the records have them.

    A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is `headline` or a
    benchmark of `tables.TABLES`.
    """

    def fill(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name == "headline":
            table = overview.headline()
        elif name == "load":
            table = tables.of(load_tables.newest_rates())
        else:
            table = tables.of(record.newest(name))
        return f"{begin}{table}\n{end}"

    return TABLE.sub(fill, page.read_text())


def main() -> None:
    """Renders, or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", action="store_true", help="compare; change nothing")
    if parser.parse_args().repeats:
        print(repeats())
        return
    plots.require_matplotlib()
    for page in PAGES:
        page.write_text(rendered(page))
    overview_plot.draw(overview.points(), PICTURE)
    if records := load_picture.shown():
        load_picture.draw(records, LOAD_PICTURE)


if __name__ == "__main__":
    main()
