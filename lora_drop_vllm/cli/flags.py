"""Flags of each command; their defaults come from the dataclass or function that takes them."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from lora_drop_vllm.cli.values import count, flag, layer_numbers, numbers, positive, shares

SYSTEMS = "an empty one, and five that name a helpful, terse or expert assistant"
MODEL = "model folder, or a name in the local Hugging Face cache"


def demo_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop demo`."""
    from lora_drop_vllm.cli import demo

    of = demo.settings
    flag(parser, of, "adapter", "adapter folder (default: the bundled one)", type=Path)
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


def check_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop check`."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="adapter folder")
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw it (needs matplotlib)")


def fit_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop fit`."""
    from lora_drop_vllm.training.settings import Settings

    _input_flags(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    _adapter_flags(parser)
    _layer_flags(parser)
    flag(parser, Settings, "tokens", "tokens of the corpus to read, at most")


def generate_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop generate`."""
    from lora_drop_vllm.training.conversations import Generation
    from lora_drop_vllm.training.generate import COUNT, generate

    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="JSON lines to write, or to resume"
    )
    flag(
        parser,
        generate,
        "count",
        f"documents to have in the file (default: {COUNT}, or an answer to each prompt)",
        type=positive,
    )
    flag(parser, generate, "batch", "documents at a time, and what a kill costs", type=positive)
    for name, meaning in (
        ("seed", "decides turns, system prompts and samples"),
        ("turns", "user turns in a conversation, at most"),
        ("max_tokens", "tokens of a reply or a continuation, at most"),
        ("greedy", "share of documents whose replies are greedy"),
        ("temperature", "temperature of the other replies"),
    ):
        flag(parser, Generation, name, meaning)
    prompts = "prompts to answer: lines of text, or .jsonl with a `prompt` or `messages` each"
    flag(parser, generate, "prompts", prompts, type=Path)
    for name, metavar, meaning in (
        ("system", "TEXT", f"system prompts of half of the conversations (default: {SYSTEMS})"),
        ("corpus", "SOURCE", "texts whose openings a model without a chat template continues"),
        ("exclude", "FILE", "conversations whose user turns must not come again"),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar=metavar, help=meaning)


def train_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop train`."""
    from lora_drop_vllm.decode.masks import BACKENDS
    from lora_drop_vllm.training.gradient import Plan
    from lora_drop_vllm.training.settings import Settings
    from lora_drop_vllm.training.trainer import train

    _input_flags(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    _adapter_flags(parser)
    _layer_flags(parser)
    flag(
        parser,
        train,
        "start",
        "begin with a fitted adapter (fit), with B = 0 and g = 1 (zero), or with the adapter in a "
        "folder",
        "--from",
        metavar="{fit,zero,DIR}",
    )
    flag(parser, Settings, "tokens", "tokens of the corpus that --from fit reads, at most")
    for name, meaning in (
        ("steps", "optimizer steps"),
        ("batch", "rows in a batch, on each device"),
        ("accumulate", "batches in an optimizer step"),
        ("lr", "highest learning rate"),
        ("warmup", "steps until the highest learning rate; then it falls along a cosine"),
        ("clip", "norm of the gradient, at most"),
        ("ce", "weight of the next-token cross-entropy"),
        ("kl", "weight of KL(base || student)"),
        ("hidden", "weight of the distance of the hidden states"),
        ("refresh_weight", "weight of the prediction of a refresh; that of a LoRA step weighs 1"),
        ("save_every", "steps between two checkpoints"),
        ("bf16", "compute in bfloat16; the adapter stays in float32"),
        ("checkpointing", "recompute layers in the backward pass: less memory, more time"),
    ):
        flag(parser, Plan, name, meaning)
    flag(parser, Plan, "attention", "attention backend", choices=BACKENDS)
    flag(parser, train, "plots", "also draw the curves (needs matplotlib)")


def profile_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop profile`."""
    from lora_drop_vllm.training.profiler import TOKENS, profile
    from lora_drop_vllm.training.settings import CRITERIA

    _input_flags(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    flag(
        parser,
        profile,
        "criterion",
        "kl also fits and drops each layer alone, and up to 8 runs of layers for each --rho; one "
        "such run takes about as long as `fit`",
        choices=CRITERIA,
    )
    flag(parser, profile, "distances", "token distances of the similarity", type=numbers)
    flag(
        parser,
        profile,
        "rhos",
        "shares of the eligible layers to choose drop layers for",
        "--rho",
        type=shares,
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"tokens of the corpus to read, at most (default: {TOKENS})",
    )
    _adapter_flags(parser)
    flag(parser, profile, "plots", "also draw figures (needs matplotlib)")


def evaluate_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop evaluate`."""
    from lora_drop_vllm.evaluation.evaluate import evaluate

    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="adapter folder")
    flag(parser, evaluate, "text", "UTF-8 text for perplexity, KL and agreement", type=Path)
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
        "windows of the text, and questions of each task, at most (default: all)",
        type=positive,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    _decoding_flags(parser)


def _decoding_flags(parser: ArgumentParser) -> None:
    from lora_drop_vllm.evaluation.served_answers import Decoding

    group = parser.add_argument_group(
        "GSM8K and HumanEval",
        "A server decodes these tasks: first with k = 0, which is the base model, then with "
        "LoRA-Drop.",
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
        "requests at a time; more are faster, but bring more full steps",
        type=positive,
    )
    flag(
        group,
        Decoding,
        "run_code",
        "run the programs that the model writes for HumanEval on this machine, in a sandbox",
    )


def _input_flags(parser: ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--corpus",
        default=["self"],
        nargs="+",
        metavar="SOURCE",
        help="text to learn from (default: self, conversations that the model itself writes once "
        "into your cache folder); text files; .jsonl files whose lines have a field `text`, or "
        "`messages` of a chat (both also as .gz); or datasets:NAME[:CONFIG[:SPLIT]], a Hugging "
        "Face dataset with such a column. SOURCE:SHARE mixes by tokens: self:0.7 books.txt:0.3",
    )


def _adapter_flags(parser: ArgumentParser) -> None:
    """What an adapter is made for."""
    from lora_drop_vllm.method.reuse import KV_MODES, REUSE, SITES
    from lora_drop_vllm.training.settings import Settings

    flag(parser, Settings, "k", "LoRA steps between two full steps")
    flag(parser, Settings, "rank", "rank r of the low-rank correction")
    flag(parser, Settings, "reuse", "what a drop layer reuses", choices=REUSE)
    flag(
        parser,
        Settings,
        "kv",
        "what a LoRA step does with the KV of the drop layers",
        choices=KV_MODES,
    )
    flag(
        parser,
        Settings,
        "injection",
        "one correction for a whole layer, or one each for attention and MLP",
        choices=SITES,
    )
    flag(parser, Settings, "length", "tokens in a row")
    flag(parser, Settings, "seed", "decides the order of the text, the prompts and the phases")


def _layer_flags(parser: ArgumentParser) -> None:
    """Which layers drop, and the file that an adapter becomes."""
    from lora_drop_vllm.method.layers import CHOICES
    from lora_drop_vllm.training.settings import CRITERIA, DTYPES, RHO, Settings

    rho = f"share of the eligible layers that drop (default: {RHO})"
    flag(parser, Settings, "rho", rho, type=float)
    flag(
        parser,
        Settings,
        "layers",
        f"how the drop layers are chosen: {', '.join((*CHOICES, *CRITERIA))}; or their numbers, "
        "such as 10-16 or 3,5,9",
        type=layer_numbers,
        metavar="CHOICE",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="profile.json by which contiguous, similarity and kl choose the layers (default: "
        "similarity and kl are measured on the corpus)",
    )
    flag(parser, Settings, "dtype", "dtype of the adapter's file", choices=DTYPES)
