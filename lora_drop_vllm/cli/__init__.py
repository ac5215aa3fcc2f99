"""`lora-drop`: parses the command line; no logic of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_drop_vllm import __version__
from lora_drop_vllm.cli.commands import (
    run_check,
    run_cost,
    run_demo,
    run_evaluate,
    run_fit,
    run_lm_eval,
    run_profile,
    run_train,
)
from lora_drop_vllm.cli.flags import (
    decoding_flags,
    layer_flags,
    model_flags,
    numbers,
    positive,
    shares,
    training_flags,
)

DEMO_EXAMPLES = """examples:
  lora-drop demo
  lora-drop demo --rho 0.1 --k 1 --tokens 32
"""
FIT_EXAMPLES = """examples:
  lora-drop fit ./model --corpus books.txt web.jsonl.gz --out ./adapter
  lora-drop fit ./model --corpus books.txt --layers 10-16 --rank 64 --kv write --out ./adapter
  lora-drop fit ./model --corpus books.txt --layers kl --profile p/profile.json --out ./adapter
"""
TRAIN_EXAMPLES = """examples:
  lora-drop train ./model --corpus web.jsonl.gz --steps 500 --out ./adapter
  lora-drop train ./model --corpus datasets:allenai/c4:en:train[:1%] --bf16 --out ./adapter
  lora-drop train ./model --corpus web.jsonl.gz --from ./fitted --lr 5e-4 --kl 1 --ce 0 --out ./b
  accelerate launch -m lora_drop_vllm.cli train ./model --corpus web.jsonl.gz --bf16 --out ./c
"""
PROFILE_EXAMPLES = """examples:
  lora-drop profile ./model --corpus web.jsonl.gz --out ./profile --plots
  lora-drop profile ./model --corpus web.jsonl.gz --criterion kl --rank 64 --out ./profile
"""
EVALUATE_EXAMPLES = """examples:
  lora-drop evaluate ./model --adapter ./adapter --text book.txt
  lora-drop evaluate ./model --adapter ./adapter --tasks piqa,winogrande --data ./tasks --limit 500
  lora-drop evaluate ./model --adapter ./adapter --tasks ./mine.jsonl --json report.json
  lora-drop evaluate ./model --adapter ./adapter --tasks gsm8k.jsonl,human_eval.jsonl --run-code
  lora-drop evaluate --url http://localhost:8000 --tasks gsm8k.jsonl --limit 200 --concurrency 8
"""
COST_EXAMPLES = """examples:
  lora-drop cost meta-llama/Llama-3.1-8B --rho 0.25,0.5 --k 1,3,5
  lora-drop cost ./model --prompt 512 --tokens 4096 --json cost.json --plot cost.png
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
    demo.set_defaults(run=run_demo)

    _looking_ahead(commands)
    _making(commands)

    evaluate = _command(
        commands, "evaluate", "score an adapter against its base model", EVALUATE_EXAMPLES
    )
    evaluate.add_argument(
        "model", nargs="?", help="model folder, or a name in the local Hugging Face cache"
    )
    evaluate.add_argument("--adapter", type=Path, help="adapter folder")
    evaluate.add_argument("--text", type=Path, help="plain text (UTF-8) for perplexity")
    evaluate.add_argument("--tasks", default="", help="JSONL files, or names in --data; by comma")
    evaluate.add_argument("--data", type=Path, default=Path(), help="folder of NAME.jsonl")
    evaluate.add_argument("--limit", type=positive, help="windows, and questions a task, at most")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write the report there too")
    decoding_flags(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    # without prefix characters nothing looks like a flag of ours
    lm_eval = commands.add_parser(
        "lm-eval", help="run lm-eval with the model lora_drop", prefix_chars="\0", add_help=False
    )
    lm_eval.add_argument("arguments", nargs="*")
    lm_eval.set_defaults(run=run_lm_eval)
    return parser


def _looking_ahead(commands: Any) -> None:
    """The commands that read a model's config only."""
    check = _command(
        commands, "check", "say whether a model and an adapter fit, offline", CHECK_EXAMPLES
    )
    check.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    check.add_argument("--adapter", required=True, type=Path, help="adapter folder")
    check.add_argument("--json", action="store_true", help="print one JSON object instead")
    check.set_defaults(run=run_check)

    cost = _command(commands, "cost", "KV and ideal speed over rho and k, offline", COST_EXAMPLES)
    cost.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    cost.add_argument("--rho", type=shares, default=(0.25, 0.5, 0.75), help="such as 0.25,0.5")
    cost.add_argument("--k", type=numbers, default=(1, 2, 3, 5), help="such as 1,3")
    cost.add_argument("--prompt", type=int, default=0, help="its length (default: 0)")
    cost.add_argument("--tokens", type=positive, default=32768, help="generated (default: 32768)")
    cost.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of the KV cache",
    )
    cost.add_argument("--json", type=Path, metavar="OUT", help="write the table there too")
    cost.add_argument("--plot", type=Path, metavar="PNG", help="draw it (matplotlib)")
    cost.set_defaults(run=run_cost)


def _making(commands: Any) -> None:
    """The commands that make an adapter."""
    fit = _command(commands, "fit", "fit an adapter in closed form", FIT_EXAMPLES)
    model_flags(fit)
    layer_flags(fit)
    fit.add_argument("--out", required=True, type=Path, help="adapter folder to write")
    fit.add_argument("--tokens", type=int, default=32768, help="of the corpus (default: 32768)")
    fit.set_defaults(run=run_fit)

    train = _command(
        commands, "train", "train an adapter; --out goes on after a kill", TRAIN_EXAMPLES
    )
    model_flags(train)
    layer_flags(train)
    training_flags(train)
    train.add_argument("--tokens", type=int, default=32768, help="for --from fit (default: 32768)")
    train.add_argument("--from", dest="start", default="fit", help="fit (default), zero, or DIR")
    train.add_argument("--out", required=True, type=Path, help="adapter folder to write")
    train.add_argument("--plots", action="store_true", help="draw the curves too (matplotlib)")
    train.set_defaults(run=run_train)

    profile = _command(commands, "profile", "measure which layers may drop", PROFILE_EXAMPLES)
    model_flags(profile)
    profile.add_argument("--out", required=True, type=Path, help="folder to write")
    profile.add_argument(
        "--criterion",
        default="similarity",
        choices=("similarity", "kl"),
        help="kl: also fit and drop each layer alone, and for each --rho up to 8 runs of |D| "
        "layers; one such run costs about as much as `fit`",
    )
    profile.add_argument("--distances", type=numbers, default=(1, 2, 3, 5, 10), help="of tokens")
    profile.add_argument("--rho", type=shares, default=(0.25, 0.5, 0.75), help="such as 0.25,0.5")
    profile.add_argument("--tokens", type=int, default=16384, help="of the corpus (default: 16384)")
    profile.add_argument("--plots", action="store_true", help="draw figures too (matplotlib)")
    profile.set_defaults(run=run_profile)


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
