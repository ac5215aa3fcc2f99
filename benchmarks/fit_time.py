"""Minutes of `lora-drop fit` with nothing but a model: first its own text, then the closed form.

Each round starts with an empty cache folder, so the model writes its conversations anew.

    python benchmarks/fit_time.py MODEL --rounds 2
    python benchmarks/record.py              renders the newest records
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import record

from lora_drop_vllm.decode.pretrained import model_name
from lora_drop_vllm.training.self_corpus import SELF

FIT = ("--rho", "0.25", "--k", "3")


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("--rounds", type=int, default=1, help="from an empty cache (default: 1)")
    given = parser.parse_args()
    rounds = [measured(given.model) for _ in range(given.rounds)]
    print(json.dumps(rounds, indent=2))
    about = {"model": model_name(given.model), "flags": list(FIT)}
    record.write("fit_time", about, {"rounds": rounds})


def measured(model: str) -> dict[str, float]:
    """Seconds of the command in an empty cache, of the same one again, and the conversations."""
    with tempfile.TemporaryDirectory() as folder:
        first, again = (_seconds(model, Path(folder)) for _ in range(2))
        (text,) = (Path(folder) / "lora_drop_vllm" / SELF).glob("*.jsonl")
        conversations = len(text.read_text().splitlines())
    return {"first_s": first, "again_s": again, "conversations": conversations}


def _seconds(model: str, cache: Path) -> float:
    command = [sys.executable, "-m", "lora_drop_vllm.cli", "fit", model, *FIT]
    command += ["--out", str(cache / "adapter")]
    start = time.monotonic()
    subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, check=True)
    return round(time.monotonic() - start, 1)


if __name__ == "__main__":
    main()
