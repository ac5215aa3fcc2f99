"""Flags of the commands that make adapters: generate, fit, train and profile."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

from lora_drop_vllm.cli.values import (
    MODEL,
    count,
    flag,
    layer_numbers,
    numbers,
    only_numbers,
    positive,
    shares,
)

SYSTEMS = "an empty one, and five that name a helpful, terse or expert assistant"


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
    from lora_drop_vllm.generation.conversations import Generation
    from lora_drop_vllm.generation.generate import COUNT, generate

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
    prompts = (
        "prompts to answer: lines of text, or .jsonl with a `prompt` or `messages` each, or with a "
        "`text` to continue as it stands, up to one of the strings in `stop`"
    )
    flag(parser, generate, "prompts", prompts, type=Path)
    flag(
        parser,
        generate,
        "adapter",
        "answer as the model served with this adapter does, loops included",
        type=str,
        metavar="DIR",
    )
    for name, metavar, meaning in (
        ("system", "TEXT", f"system prompts of half of the conversations (default: {SYSTEMS})"),
        ("corpus", "SOURCE", "texts whose openings a model without a chat template continues"),
        ("exclude", "FILE", "conversations whose user turns must not come again"),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar=metavar, help=meaning)


def train_flags(parser: ArgumentParser) -> None:
    """Flags of `lora-drop train`."""
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
        "begin with a fitted adapter (fit), with B = 0 and g = 1 (zero), or with an adapter: a "
        "folder, or org/name on the Hugging Face Hub",
        "--from",
        metavar="{fit,zero,DIR}",
    )
    flag(parser, Settings, "tokens", "tokens of the corpus that --from fit reads, at most")
    _loop_flags(parser)
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
    flag(
        parser,
        profile,
        "save_kv",
        "propose which layers drop whole and which only their attention, to save that share of the "
        "KV of generated tokens; needs --criterion kl",
        type=float,
    )
    flag(
        parser,
        profile,
        "speed",
        "the same for an ideal speed such as 1.3, layers alone",
        type=float,
    )
    context = "tokens whose KV a step reads, of all requests together, for --speed"
    flag(parser, profile, "context", context, type=count)
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"tokens of the corpus to read, at most (default: {TOKENS})",
    )
    _adapter_flags(parser)
    flag(parser, profile, "plots", "also draw figures (needs matplotlib)")


def _loop_flags(parser: ArgumentParser) -> None:
    """Flags of the training loop."""
    from lora_drop_vllm.decode.masks import BACKENDS
    from lora_drop_vllm.training.gradient import Plan
    from lora_drop_vllm.training.objective import DIVERGENCES, LEAVE

    for name, meaning in (
        ("steps", "optimizer steps"),
        ("batch", "rows in a batch, on each device"),
        ("accumulate", "batches in an optimizer step"),
        ("lr", "highest learning rate"),
        ("warmup", "steps until the highest learning rate; then it falls along a cosine"),
        ("clip", "norm of the gradient, at most"),
        ("ce", "weight of the next-token cross-entropy"),
        ("kl", "weight of the divergence from the base model"),
        ("hidden", "weight of the distance of the hidden states"),
        ("refresh_weight", "weight of the prediction of a refresh; that of a LoRA step weighs 1"),
        ("rollouts", "steps after which the adapter answers prompts of the corpus anew; 0: never"),
        ("rollout_prompts", "prompts that it answers each time"),
        ("on_policy", "share of the tokens that come from its answers"),
        ("rollout_greedy", "share of greedy ones among its answers; the others are sampled"),
        (
            "leave_loops",
            "where one of its answers says a phrase of 8 tokens three times, take the token that "
            f"goes on with it out of the base model's distribution if the others have {LEAVE} or "
            "more, and weigh the divergence there by X; 0: never",
        ),
        ("save_every", "steps between two checkpoints"),
        ("checkpointing", "recompute layers in the backward pass: less memory, more time"),
    ):
        flag(parser, Plan, name, meaning)
    flag(
        parser,
        Plan,
        "divergence",
        "what --kl weighs: KL(base || student), KL(student || base), or Jensen-Shannon",
        choices=DIVERGENCES,
    )
    parser.add_argument(
        "--bf16",
        action=BooleanOptionalAction,
        help="compute in bfloat16; the adapter stays in float32 (default: where the processor has "
        "instructions for it)",
    )
    parser.add_argument(
        "--attention",
        choices=BACKENDS,
        help="attention backend (default: matmul on CPUs in bfloat16, else sdpa)",
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
        "one correction for a whole layer, one each for attention and MLP, or one for the "
        "attention alone; the MLP then still runs",
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
        "--drop-attention",
        type=only_numbers,
        default=(),
        metavar="N,...",
        help="further layers of which only the attention drops, such as 10-16 or 3,5,9; without "
        "numbers in --layers no layer drops whole",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="profile.json by which contiguous, similarity and kl choose the layers (default: "
        "similarity and kl are measured on the corpus)",
    )
    flag(parser, Settings, "dtype", "dtype of the adapter's file", choices=DTYPES)
