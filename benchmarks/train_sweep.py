"""Settings of `lora-drop train`, one changed at a time: KL on conversations held apart, and speed.

Every run starts from its own closed form. The first has the plain flags; each further one adds one
`--vary`. Another `--seed` shows how far equal settings lie apart.

    python benchmarks/train_sweep.py MODEL --chat held.jsonl --steps 60 \
        --flags "--corpus self --length 512 --batch 2 --ce 0" \
        --vary "--seed 1" "--lr 3e-4" "--length 256 --batch 4" "--corpus self:0.5 books.txt:0.5"
    python benchmarks/record.py              renders the newest records
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import record
from tqdm import tqdm

from lora_drop_vllm.cli import main as lora_drop
from lora_drop_vllm.decode.pretrained import model_name
from lora_drop_vllm.evaluation.evaluate import evaluate
from lora_drop_vllm.training.checkpoint import read_log

SLOW_START = 5  # steps without their tokens/s, during which memory is first taken


def main() -> None:
    """Trains, measures, prints and records."""
    given = _arguments()
    runs = [
        measured(given.model, given.steps, f"{given.flags} {vary}".strip(), given.chat)
        | {"vary": record.without_folders(vary)}
        for vary in tqdm(["", *given.vary], desc="Runs", unit="run")
    ]
    print(json.dumps(runs, indent=2))
    about = {"model": model_name(given.model), "chat": given.chat.name, "steps": given.steps}
    record.write(
        "train_sweep", about | {"flags": record.without_folders(given.flags)}, {"runs": runs}
    )


def measured(model: str, steps: int, flags: str, chat: Path) -> dict[str, Any]:
    """Tokens trained on and per second, and the divergence of the finished adapter on `chat`."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", model, *shlex.split(flags), "--out", folder]
        if lora_drop([*command, "--steps", str(steps), "--save-every", str(steps)]):
            raise SystemExit(f"no record: `lora-drop train` with {flags!r} failed")
        log = read_log(Path(folder), steps)
        found = evaluate(model, folder, chat=chat).chat
    assert found is not None
    return {
        "tokens": sum(entry["tokens"] for entry in log),
        "tokens_per_s": statistics.median(entry["tokens_per_s"] for entry in log[SLOW_START:]),
        "steps": {kind: asdict(divergence) for kind, divergence in found.steps.items()},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, or a name in the local Hugging Face cache")
    add("--chat", required=True, type=Path, help="conversations, none of them in the corpus")
    add("--steps", type=int, default=60, help="of each run (default: 60)")
    add("--flags", default="", help="of `lora-drop train`, in all runs")
    add("--vary", nargs="+", default=[], metavar="FLAGS", help="of one further run each")
    given = parser.parse_args()
    if given.steps <= SLOW_START:
        parser.error(f"--steps {given.steps}: expected more than {SLOW_START}")
    return given


if __name__ == "__main__":
    main()
