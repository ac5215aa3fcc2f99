"""`lora-drop`: parses the command line and calls; no logic of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_drop_vllm import __version__

DEMO_EXAMPLES = """examples:
  lora-drop demo
  lora-drop demo --rho 0.1 --k 1 --tokens 32
"""
FIT_EXAMPLES = """examples:
  lora-drop fit ./model --text corpus.txt --drop-layers 10-16 --out ./adapter
"""
EVALUATE_EXAMPLES = """examples:
  lora-drop evaluate ./model --adapter ./adapter --text book.txt
  lora-drop evaluate ./model --adapter ./adapter --tasks piqa,winogrande --data ./tasks --limit 500
  lora-drop evaluate ./model --adapter ./adapter --tasks ./mine.jsonl --json report.json
"""
CHECK_EXAMPLES = """examples:
  lora-drop check meta-llama/Llama-3.1-8B --adapter ./adapter
  lora-drop check ./model --adapter ./adapter --json
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except (ValueError, RuntimeError) as error:
        print(f"lora-drop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlora-drop: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-drop", description="LoRA-Drop for vLLM")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "serve a real 135M model and measure it", DEMO_EXAMPLES)
    demo.add_argument("--adapter", help="adapter folder (default: the bundled one)")
    demo.add_argument("--untrained", action="store_true", help="no adapter: B = 0 and g = 1")
    demo.add_argument("--rho", type=float, help="share of the eligible layers that drop")
    demo.add_argument("--k", type=int, default=3, help="LoRA steps per full step (default: 3)")
    demo.add_argument("--tokens", type=int, default=64, help="answer length (default: 64)")
    demo.add_argument("--port", type=int, help="of the server (default: a free one)")
    demo.set_defaults(run=_demo)

    check = _command(
        commands, "check", "say whether a model and an adapter fit, offline", CHECK_EXAMPLES
    )
    check.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    check.add_argument("--adapter", required=True, type=Path, help="adapter folder")
    check.add_argument("--json", action="store_true", help="print one JSON object instead")
    check.set_defaults(run=_check)

    fit = _command(commands, "fit", "fit an adapter in closed form", FIT_EXAMPLES)
    fit.add_argument("model", type=Path, help="model folder")
    fit.add_argument("--text", required=True, type=Path, help="plain text to fit on (UTF-8)")
    fit.add_argument("--out", required=True, type=Path, help="adapter folder to write")
    fit.add_argument("--drop-layers", required=True, type=_layers, help="such as 10-16 or 5,9,12")
    fit.add_argument("--k", type=int, default=3, help="default: 3")
    fit.add_argument("--rank", type=int, default=16, help="default: 16")
    fit.add_argument("--reuse", default="update", help="anchor, update (default) or none")
    fit.add_argument("--kv", default="skip", help="skip (default) or write")
    fit.add_argument("--windows", type=int, default=96, help="of 256 tokens (default: 96)")
    fit.set_defaults(run=_fit)

    evaluate = _command(
        commands, "evaluate", "score an adapter against its base model, offline", EVALUATE_EXAMPLES
    )
    evaluate.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    evaluate.add_argument("--adapter", required=True, type=Path, help="adapter folder")
    evaluate.add_argument("--text", type=Path, help="plain text (UTF-8) for perplexity")
    evaluate.add_argument("--tasks", default="", help="JSONL files, or names in --data; by comma")
    evaluate.add_argument("--data", type=Path, default=Path(), help="folder of NAME.jsonl")
    evaluate.add_argument("--limit", type=_positive, help="windows, and questions a task, at most")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write the report there too")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _layers(text: str) -> list[int]:
    """Parse `10-16` or `5,9,12` into layer numbers."""
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers |= set(range(int(first), int(last or first) + 1))
    return sorted(layers)


def _positive(text: str) -> int:
    """Parse a number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm import demo

    demo.run(demo.settings(arguments), arguments.tokens, arguments.port)
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.fit import fit
    from lora_drop_vllm.offline.tasks import read_text

    config = fit(
        arguments.model,
        read_text(arguments.text),
        arguments.out,
        drop_layers=arguments.drop_layers,
        k=arguments.k,
        rank=arguments.rank,
        reuse=arguments.reuse,
        kv=arguments.kv,
        windows=arguments.windows,
    )
    print(f"{arguments.out}: drop layers {config.drop_layers}, rank {config.r}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.evaluate import evaluate

    report = evaluate(
        arguments.model,
        arguments.adapter,
        text=arguments.text,
        tasks=[name for name in arguments.tasks.split(",") if name],
        data=arguments.data,
        limit=arguments.limit,
        out=arguments.json,
    )
    print(report)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.check import check

    print(check(arguments.model, arguments.adapter, as_json=arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
