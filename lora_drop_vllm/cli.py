"""`lora-drop`: parses the command line and calls; no logic of its own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_drop_vllm import __version__
from lora_drop_vllm.cli_flags import (
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
LM_EVAL_EXAMPLES = """lm-eval's own command, which then knows the model lora_drop

its flags: lora-drop lm-eval run --help
--model_args: pretrained=MODEL, adapter=DIR, k=N (default: the adapter's; 0 is the base model), and
those of lm-eval's model hf, such as dtype=float32

examples:
  lora-drop lm-eval --model lora_drop --model_args pretrained=./model,adapter=./adapter \\
      --tasks hellaswag,piqa --limit 500 --output_path report.json
  lora-drop lm-eval --model lora_drop --model_args pretrained=./model,adapter=./adapter,k=7 \\
      --tasks wikitext --batch_size 8
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
    evaluate.set_defaults(run=_evaluate)

    # without prefix characters nothing looks like a flag of ours
    lm_eval = commands.add_parser(
        "lm-eval", help="run lm-eval with the model lora_drop", prefix_chars="\0", add_help=False
    )
    lm_eval.add_argument("arguments", nargs="*")
    lm_eval.set_defaults(run=_lm_eval)
    return parser


def _looking_ahead(commands: Any) -> None:
    """The commands that read a model's config only."""
    check = _command(
        commands, "check", "say whether a model and an adapter fit, offline", CHECK_EXAMPLES
    )
    check.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    check.add_argument("--adapter", required=True, type=Path, help="adapter folder")
    check.add_argument("--json", action="store_true", help="print one JSON object instead")
    check.set_defaults(run=_check)

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
    cost.set_defaults(run=_cost)


def _making(commands: Any) -> None:
    """The commands that make an adapter."""
    fit = _command(commands, "fit", "fit an adapter in closed form", FIT_EXAMPLES)
    model_flags(fit)
    layer_flags(fit)
    fit.add_argument("--out", required=True, type=Path, help="adapter folder to write")
    fit.add_argument("--tokens", type=int, default=32768, help="of the corpus (default: 32768)")
    fit.set_defaults(run=_fit)

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
    train.set_defaults(run=_train)

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
    profile.set_defaults(run=_profile)


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _settings(arguments: argparse.Namespace, **given: Any) -> Any:
    from lora_drop_vllm.offline.settings import Settings

    flags = {f.name for f in fields(Settings)} & vars(arguments).keys()
    return Settings(**{**{name: getattr(arguments, name) for name in flags}, **given})


def _demo(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm import demo

    demo.run(demo.settings(arguments), arguments.tokens, arguments.port)
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.fit import fit

    settings = _settings(arguments)
    print(fit(arguments.model, arguments.corpus, settings, arguments.out, arguments.profile))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.gradient import Plan
    from lora_drop_vllm.offline.trainer import train

    print(
        train(
            arguments.model,
            arguments.corpus,
            _settings(arguments),
            Plan(**{f.name: getattr(arguments, f.name) for f in fields(Plan)}),
            arguments.out,
            start=arguments.start,
            profile=arguments.profile,
            plots=arguments.plots,
        )
    )
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.profiler import profile

    report = profile(
        arguments.model,
        arguments.corpus,
        _settings(arguments, rho=None),
        arguments.out,
        criterion=arguments.criterion,
        distances=arguments.distances,
        rhos=arguments.rho,
        plots=arguments.plots,
    )
    print(report)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.evaluate import evaluate
    from lora_drop_vllm.offline.generative import Decoding

    report = evaluate(
        arguments.model,
        arguments.adapter,
        text=arguments.text,
        tasks=[name for name in arguments.tasks.split(",") if name],
        data=arguments.data,
        limit=arguments.limit,
        decoding=Decoding(**{f.name: getattr(arguments, f.name) for f in fields(Decoding)}),
        out=arguments.json,
    )
    print(report)
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.cost import cost

    report = cost(
        arguments.model,
        arguments.rho,
        arguments.k,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        dtype=arguments.dtype,
        out=arguments.json,
        plot=arguments.plot,
    )
    print(report)
    return 0


def _lm_eval(arguments: argparse.Namespace) -> int:
    if arguments.arguments in ([], ["-h"], ["--help"]):
        print(LM_EVAL_EXAMPLES, end="")
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval: not installed; pip install 'lora_drop_vllm[eval]'")
    from lora_drop_vllm.offline.lm_eval_model import run

    run(arguments.arguments)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from lora_drop_vllm.offline.check import check

    print(check(arguments.model, arguments.adapter, as_json=arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
