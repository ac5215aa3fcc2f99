"""Flags that several commands share, and how their values are parsed."""

from __future__ import annotations

import argparse
from pathlib import Path


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The model, the text, and what an adapter is made for."""
    parser.add_argument("model", help="model folder, or a name in the local Hugging Face cache")
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="FILE",
        help="plain text, or JSON lines with a field `text` or a chat's `messages`; .gz too; or "
        "datasets:NAME[:CONFIG[:SPLIT]], a Hugging Face dataset with such a column",
    )
    parser.add_argument("--k", type=int, default=3, help="LoRA steps per full step (default: 3)")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument(
        "--reuse", default="update", help="previous, anchor, update (default), none"
    )
    parser.add_argument("--kv", default="skip", help="skip (default) or write")
    parser.add_argument("--injection", default="block", help="block (default) or attn_mlp")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def layer_flags(parser: argparse.ArgumentParser) -> None:
    """Which layers drop."""
    parser.add_argument("--rho", type=float, help="share of eligible layers in D (default: 0.25)")
    parser.add_argument(
        "--layers",
        default="contiguous",
        type=layer_numbers,
        help="contiguous (default), uniform, similarity, kl, or such as 10-16 or 3,5,9",
    )
    parser.add_argument("--profile", type=Path, help="profile.json that scores the layers")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the adapter's file: float32 (default), bfloat16, float16",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `offline.gradient.Plan`."""
    for flag, kind, default, meaning in (
        ("--steps", int, 500, "optimizer steps"),
        ("--batch", int, 4, "rows at once"),
        ("--accumulate", int, 1, "batches a step"),
        ("--lr", float, 1e-3, "highest learning rate"),
        ("--warmup", int, 20, "steps up to there; then it falls along a cosine"),
        ("--clip", float, 1.0, "norm of the gradient, at most"),
        ("--ce", float, 1.0, "weight of the next-token cross-entropy"),
        ("--kl", float, 1.0, "weight of KL(base || student)"),
        ("--hidden", float, 0.0, "weight of the distance of the hidden states"),
        (
            "--refresh-weight",
            float,
            1.0,
            "weight of a refresh's prediction; a LoRA step's weighs 1",
        ),
        ("--save-every", int, 50, "steps between two checkpoints"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (default: where the processor has instructions for it)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument(
        "--attention",
        help="sdpa, matmul, flex or xformers (default: matmul on CPUs in bfloat16, else sdpa)",
    )


def decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `offline.generative.Decoding`."""
    flags = parser.add_argument_group(
        "tasks that a server decodes",
        "GSM8K and HumanEval in their published form: the base model (k = 0), then LoRA-Drop",
    )
    flags.add_argument("--url", help="of a running server (default: one is started, eager)")
    flags.add_argument(
        "--dtype", default="auto", help="of the one that is started, as for vLLM (default: auto)"
    )
    flags.add_argument(
        "--num-fewshot",
        type=count,
        default=5,
        metavar="N",
        help="the first N questions of GSM8K's file are worked examples (default: 5)",
    )
    flags.add_argument(
        "--max-tokens", type=positive, default=512, metavar="N", help="of an answer (default: 512)"
    )
    flags.add_argument(
        "--concurrency",
        type=positive,
        default=1,
        metavar="N",
        help="requests at a time (default: 1); more are faster, but bring more full steps",
    )
    flags.add_argument(
        "--run-code",
        action="store_true",
        help="let the programs that the model writes for HumanEval run here, in a sandbox",
    )


def layer_numbers(text: str) -> str | tuple[int, ...]:
    """Parse `10-16` or `5,9,12` into layer numbers; a name stays one."""
    if not text[:1].isdigit():
        return text
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def numbers(text: str) -> tuple[int, ...]:
    """Parse `1,2,3` into numbers of at least 1."""
    return tuple(positive(part) for part in text.split(","))


def shares(text: str) -> tuple[float, ...]:
    """Parse `0.25,0.5`."""
    return tuple(float(part) for part in text.split(","))


def count(text: str) -> int:
    """Parse a number of at least 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)
