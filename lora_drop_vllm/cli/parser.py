"""The command line of `lora-drop`: one entry per command, with its summary and examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from lora_drop_vllm import __version__
from lora_drop_vllm.cli import commands, flags, training_flags


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: its line in `lora-drop --help`
        about: first paragraph of its own `--help`
        examples: command lines, last in its `--help`
        add_flags: adds its flags to a parser
        run: runs it; returns the exit status
    """

    summary: str
    about: str
    examples: tuple[str, ...]
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "demo": Command(
        summary="serve a real 135M model and measure it",
        about="Serves a real 135M model with LoRA-Drop, streams one answer, and compares latency "
        "and KV with the same server at k = 0. The model is fetched once into your cache folder. "
        "Needs no GPU.",
        examples=(
            "lora-drop demo",
            "lora-drop demo --rho 0.1 --k 1 --tokens 32",
        ),
        add_flags=flags.demo_flags,
        run=commands.run_demo,
    ),
    "playground": Command(
        summary="see on a page which tokens skipped layers",
        about="Opens a page that asks one prompt of the base model and of LoRA-Drop, and shows "
        "which tokens skipped layers and what the base model thinks of each. Starts a server, or "
        "uses a running one. The default is the demo's model and its bundled adapter.",
        examples=(
            "lora-drop playground",
            "lora-drop playground ./model --adapter ./adapter",
            "lora-drop playground --url http://localhost:8000",
            "lora-drop playground --url http://localhost:8000 --text 'What is a compiler?'",
        ),
        add_flags=flags.playground_flags,
        run=commands.run_playground,
    ),
    "check": Command(
        summary="check that an adapter fits a model, offline",
        about="Checks that an adapter fits a model, and shows what serving the two would save. "
        "Reads the model's config and the adapter; starts no server.",
        examples=(
            "lora-drop check meta-llama/Llama-3.1-8B --adapter ./adapter",
            "lora-drop check ./model --adapter ./adapter --json",
        ),
        add_flags=flags.check_flags,
        run=commands.run_check,
    ),
    "cost": Command(
        summary="compute KV and ideal speed over rho and k, offline",
        about="Computes how much KV a model would save, and how fast it could be at best, for "
        "each rho and k. Reads the model's config only.",
        examples=(
            "lora-drop cost meta-llama/Llama-3.1-8B --rho 0.25,0.5 --k 1,3,5",
            "lora-drop cost ./model --prompt 512 --tokens 4096 --json cost.json --plot cost.png",
        ),
        add_flags=flags.cost_flags,
        run=commands.run_cost,
    ),
    "fit": Command(
        summary="fit an adapter in closed form",
        about="Fits an adapter layer by layer, without gradients: minutes on 2 cores for a 135M "
        "model.",
        examples=(
            "lora-drop fit ./model --rho 0.25 --k 3 --out ./adapter",
            "lora-drop fit ./model --corpus books.txt web.jsonl.gz --out ./adapter",
            "lora-drop fit ./model --corpus books.txt --layers 10-16 --kv write --out ./adapter",
            "lora-drop fit ./model --corpus books.txt --layers kl --profile p/profile.json "
            "--out ./adapter",
        ),
        add_flags=training_flags.fit_flags,
        run=commands.run_fit,
    ),
    "generate": Command(
        summary="have the model write text to learn from",
        about="Has the model write its own training text: it samples user turns behind the empty "
        "user header of its chat template, and answers them. A model without a chat template "
        "continues texts. Repetitive and broken text is left out. Run the same command again to "
        "resume a killed run, or with a larger --count to write more. Needs vLLM.",
        examples=(
            "lora-drop generate ./model --count 1000 --out conversations.jsonl",
            "lora-drop generate ./model --seed 1 --exclude conversations.jsonl --count 200 "
            "--out held_out.jsonl",
            "lora-drop generate ./model --prompts questions.txt --greedy 1 --out answers.jsonl",
            "lora-drop generate ./model --adapter ./adapter --prompts asked.txt --out ours.jsonl",
            "lora-drop generate ./base-model --corpus books.txt --out continuations.jsonl",
        ),
        add_flags=training_flags.generate_flags,
        run=commands.run_generate,
    ),
    "train": Command(
        summary="train an adapter by gradients; resumes from --out",
        about="Trains an adapter by gradients. Run the same command again to resume a killed "
        "run from its last checkpoint in --out; the resulting adapter is identical. To train on "
        "several GPUs, start it with `accelerate launch -m lora_drop_vllm.cli train ...`.",
        examples=(
            "lora-drop train ./model --corpus self:0.7 books.txt:0.3 --out ./adapter",
            "lora-drop train ./model --corpus web.jsonl.gz --steps 500 --out ./adapter",
            "lora-drop train ./model --corpus datasets:allenai/c4:en:train[:1%] --bf16 "
            "--out ./adapter",
            "lora-drop train ./model --corpus web.jsonl.gz --from ./fitted --lr 5e-4 --ce 0 "
            "--out ./b",
            "accelerate launch -m lora_drop_vllm.cli train ./model --corpus web.jsonl.gz --out ./c",
        ),
        add_flags=training_flags.train_flags,
        run=commands.run_train,
    ),
    "profile": Command(
        summary="measure which layers may drop",
        about="Measures which layers a model can do without, and writes scores and drop layers "
        "to profile.json, which `fit` and `train` read with --profile.",
        examples=(
            "lora-drop profile ./model --out ./profile",
            "lora-drop profile ./model --corpus web.jsonl.gz --out ./profile --plots",
            "lora-drop profile ./model --corpus web.jsonl.gz --criterion kl --rank 64 "
            "--out ./profile",
        ),
        add_flags=training_flags.profile_flags,
        run=commands.run_profile,
    ),
    "evaluate": Command(
        summary="score an adapter against its base model",
        about="Scores an adapter beside its base model: perplexity, KL and agreement on a text, "
        "accuracy on tasks, loops and variety of answers to chat prompts. Everything after the "
        "prompt runs under the served schedule. GSM8K, HumanEval and --rollouts are decoded by a "
        "server.",
        examples=(
            "lora-drop evaluate ./model --adapter ./adapter --text book.txt",
            "lora-drop evaluate ./model --adapter ./adapter --rollouts --json report.json",
            "lora-drop evaluate ./model --adapter ./adapter --tasks piqa,winogrande "
            "--data ./tasks --limit 500",
            "lora-drop evaluate ./model --adapter ./adapter --tasks ./mine.jsonl "
            "--json report.json",
            "lora-drop evaluate ./model --adapter ./adapter --tasks gsm8k.jsonl,human_eval.jsonl "
            "--run-code",
            "lora-drop evaluate --url http://localhost:8000 --tasks gsm8k.jsonl --limit 200 "
            "--concurrency 8",
        ),
        add_flags=flags.evaluate_flags,
        run=commands.run_evaluate,
    ),
}


def make_parser(chosen: str) -> argparse.ArgumentParser:
    """Parser of `lora-drop`; of the commands only the chosen one gets its flags.

    Their defaults come from code that imports torch, which `lora-drop --help` need not wait for.
    """
    parser = argparse.ArgumentParser(
        prog="lora-drop",
        description="LoRA-Drop for vLLM: make adapters, check them, and measure what they save.",
        epilog="`lora-drop COMMAND --help` shows a command's flags and examples.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = choices.add_parser(
            name,
            help=command.summary,
            description=command.about,
            epilog="\n  ".join(("examples:", *command.examples)),
            formatter_class=_Help,
        )
        if name == chosen:
            command.add_flags(own)
        own.set_defaults(run=command.run)
    # lm-eval parses its own flags; with this prefix character argparse sees none of them
    lm_eval = choices.add_parser(
        "lm-eval",
        help="run lm-eval with the model lora_drop",
        prefix_chars="\0",
        add_help=False,
    )
    lm_eval.add_argument("arguments", nargs="*")
    lm_eval.set_defaults(run=commands.run_lm_eval)
    return parser


class _Help(argparse.HelpFormatter):
    """Wraps all text but the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)
