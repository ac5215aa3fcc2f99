"""Renders the newest records into the README.

python benchmarks/record.py                renders
python benchmarks/record.py --repeats      how far repeated runs agree
"""

from __future__ import annotations

import argparse
from pathlib import Path

from support import record, tables

BEGIN, END = "<!-- rendered by benchmarks/record.py -->", "<!-- end -->"
NOT_IN_README = ("step_breakdown",)  # for those who work on the engine
GRIDS = ("decode_latency", "kv_saving")  # of these README has k = 3, docs/quality.md all
README = Path(__file__).parent.parent / "README.md"


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


def rendered_readme() -> str:
    """The README with its tables as the records have them."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    shown = [
        r
        for r in record.newest()
        if r["benchmark"] not in NOT_IN_README
        and (r["benchmark"] not in GRIDS or r["settings"]["k"] == 3)
    ]
    return f"{before}{BEGIN}\n{tables.of(shown)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Render the README, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", action="store_true", help="compare; change nothing")
    if parser.parse_args().repeats:
        print(repeats())
    else:
        README.write_text(rendered_readme())


if __name__ == "__main__":
    main()
