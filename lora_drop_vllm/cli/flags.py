"""Flags of each command; their defaults come from the dataclass or function that takes them."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from lora_drop_vllm.cli.values import ADAPTER, MODEL, count, flag, numbers, positive, shares

SYSTEMS = "an empty one, and five that name a helpful, terse or expert assistant"


def demo_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop demo`."""
    from lora_drop_vllm.cli import demo

    of = demo.settings
    flag(parser, of, "adapter", f"{ADAPTER} (default: the bundled one)", type=Path)
    flag(parser, of, "untrained", "use no adapter: B = 0 and g = 1")
    flag(
        parser,
        of,
        "rho",
        "share of the eligible layers that drop (default: the adapter's)",
        type=float,
    )
    flag(parser, of, "k", "LoRA steps between two full steps")
    flag(parser, demo.run, "tokens", "length of the answer")
    flag(parser, demo.run, "port", "port of the server (default: a free one)", type=int)


def playground_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop playground`."""
    from lora_drop_vllm.playground.answers import Sampling
    from lora_drop_vllm.playground.launch import Model, open_page

    parser.add_argument("model", nargs="?", help=f"{MODEL} (default: the demo's)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help=ADAPTER)
    parser.add_argument("--untrained", action="store_true", help="use no adapter: B = 0 and g = 1")
    parser.add_argument(
        "--rho", type=float, metavar="X", help="share of the eligible layers that drop"
    )
    parser.add_argument(
        "--k",
        type=count,
        metavar="N",
        help="LoRA steps between two full steps (default: the adapter's)",
    )
    flag(parser, Model, "dtype", "dtype of the server that is started, as for vLLM")
    parser.add_argument("--url", help="a running server, instead of a model")
    flag(parser, open_page, "host", "address that the page listens on")
    flag(parser, open_page, "port", "port of the page; 0 for a free one", type=count)
    terminal = parser.add_argument_group("without a browser")
    terminal.add_argument("--text", help="prompt; prints both answers and exits")
    flag(terminal, Sampling, "max_tokens", "length of an answer at most", type=positive)
    flag(terminal, Sampling, "temperature", "0 takes the most likely token")


def check_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop check`."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help=ADAPTER)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def cost_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop cost`."""
    from lora_drop_vllm.cli.cost import BYTES, cost

    parser.add_argument("model", help=MODEL)
    flag(parser, cost, "rhos", "shares of the eligible layers that drop", "--rho", type=shares)
    flag(parser, cost, "ks", "LoRA steps between two full steps", "--k", type=numbers)
    flag(parser, cost, "prompt", "tokens of the prompt", type=count)
    flag(parser, cost, "tokens", "tokens generated after it", type=positive)
    flag(parser, cost, "dtype", "dtype of the KV cache", choices=BYTES)
    context = "tokens whose KV a step reads, of all requests together (for attention alone)"
    flag(parser, cost, "context", context, type=count)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw it (needs matplotlib)")


def evaluate_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop evaluate`."""
    from lora_drop_vllm.evaluation.evaluate import evaluate
    from lora_drop_vllm.evaluation.rollouts import CHAT_PROMPTS

    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--adapter", type=Path, metavar="DIR", help=ADAPTER)
    flag(parser, evaluate, "text", "UTF-8 text for perplexity, KL and agreement", type=Path)
    flag(
        parser,
        evaluate,
        "chat",
        "JSON lines of conversations (`messages`) or plain prompts (`prompt` and `completion`), "
        "whose replies are measured likewise",
        type=Path,
    )
    flag(
        parser,
        evaluate,
        "rollouts",
        "have a server answer chat prompts, one a line or JSON lines, and compare the answers "
        "(default without PROMPTS: 200 everyday ones that come with the package)",
        type=Path,
        nargs="?",
        const=CHAT_PROMPTS,
        metavar="PROMPTS",
    )
    parser.add_argument(
        "--tasks",
        default="",
        metavar="NAME,...",
        help="JSONL files, or names of such files in --data, separated by commas",
    )
    flag(parser, evaluate, "data", "folder with NAME.jsonl", type=Path)
    flag(
        parser,
        evaluate,
        "limit",
        "windows of the text, replies, prompts, and questions of each task, at most (default: all)",
        type=positive,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    _decoding_flags(parser)


def _decoding_flags(parser: ArgumentParser) -> None:
    from lora_drop_vllm.evaluation.served_answers import Decoding

    group = parser.add_argument_group(
        "GSM8K, HumanEval and --rollouts",
        "A server decodes them: first with k = 0, which is the base model, then with LoRA-Drop.",
    )
    flag(group, Decoding, "url", "ask this server (default: start one, eager)", type=str)
    flag(group, Decoding, "dtype", "dtype of the server that is started, as for vLLM")
    flag(
        group,
        Decoding,
        "num_fewshot",
        "number of worked examples: the first questions of GSM8K's file",
        type=count,
    )
    flag(group, Decoding, "max_tokens", "tokens of an answer, at most", type=positive)
    flag(
        group,
        Decoding,
        "concurrency",
        "requests at a time",
        type=positive,
    )
    flag(group, Decoding, "temperature", "of --rollouts; 0 takes the most likely token")
    flag(
        group,
        Decoding,
        "run_code",
        "run the programs that the model writes for HumanEval on this machine, in a sandbox",
    )
