"""What each command of `lora-drop` does: it calls one function and prints what that returns.

They return the exit status. Imports are in the functions, because most of them load torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

LM_EVAL_HELP = """lm-eval's own command, with the model lora_drop added

lm-eval's flags: lora-drop lm-eval run --help
--model_args: pretrained=MODEL, adapter=DIR, k=N (default: the adapter's; 0 is the base model), and
those of lm-eval's model hf, such as dtype=float32

examples:
  lora-drop lm-eval --model lora_drop --model_args pretrained=./model,adapter=./adapter \\
      --tasks hellaswag,piqa --limit 500 --output_path report.json
  lora-drop lm-eval --model lora_drop --model_args pretrained=./model,adapter=./adapter,k=7 \\
      --tasks wikitext --batch_size 8
"""


def _flags(arguments: argparse.Namespace, of: Callable[..., Any]) -> dict[str, Any]:
    """The flags that are parameters of a dataclass or function, by name."""
    given = vars(arguments)
    return {name: given[name] for name in signature(of).parameters if name in given}


def run_demo(arguments: argparse.Namespace) -> int:
    """Serves the real model and measures it."""
    from lora_drop_vllm.cli import demo

    settings = demo.settings(**_flags(arguments, demo.settings))
    demo.run(settings, **_flags(arguments, demo.run))
    return 0


def run_playground(arguments: argparse.Namespace) -> int:
    """Compares base model and LoRA-Drop on a page, or with --text in the terminal."""
    from lora_drop_vllm.playground.answers import Sampling
    from lora_drop_vllm.playground.launch import answer_in_terminal, open_page

    behind = arguments.url or _model_to_play_with(arguments)
    taken = [name for name in ("model", "adapter", "rho") if getattr(arguments, name) is not None]
    if arguments.url and taken:
        raise ValueError(f"--url {arguments.url}: that server has its {taken[0]}; leave one out")
    if arguments.text is None:
        open_page(behind, **_flags(arguments, open_page))
    else:
        sampling = Sampling(**_flags(arguments, Sampling))
        answer_in_terminal(behind, arguments.text, arguments.k, sampling)
    return 0


def _model_to_play_with(arguments: argparse.Namespace) -> Any:
    """The model and adapter of the command line; the demo's where it names none."""
    from lora_drop_vllm.cli import demo
    from lora_drop_vllm.playground.launch import Model

    if arguments.model and not (arguments.adapter or arguments.untrained):
        raise ValueError(
            f"{arguments.model}: needs --adapter DIR, or --untrained to see speed only"
        )
    settings = {
        name: given for name in ("rho", "k") if (given := getattr(arguments, name)) is not None
    }
    if arguments.untrained:
        settings["untrained"] = True
    else:
        settings["adapter"] = str(arguments.adapter or demo.BUNDLED_ADAPTER)
    path = Path(arguments.model) if arguments.model else demo.real_model()
    return Model(path, settings, arguments.dtype)


def run_check(arguments: argparse.Namespace) -> int:
    """Checks that an adapter fits a model."""
    from lora_drop_vllm.cli.check import check

    result = check(arguments.model, arguments.adapter)
    print(json.dumps(result.report()) if arguments.json else result)
    return 0


def run_cost(arguments: argparse.Namespace) -> int:
    """Computes KV and ideal speed over rho and k."""
    from lora_drop_vllm.cli.cost import cost
    from lora_drop_vllm.plots import plot_saving, require_matplotlib

    if arguments.plot:
        require_matplotlib("--plot")
    result = cost(**_flags(arguments, cost))
    if arguments.json:
        arguments.json.write_text(json.dumps(result.report(), indent=2) + "\n")
    if arguments.plot:
        plot_saving(result.curves(), [], arguments.plot)
    print(result)
    return 0


def run_fit(arguments: argparse.Namespace) -> int:
    """Fits an adapter in closed form."""
    from lora_drop_vllm.training.fit import fit
    from lora_drop_vllm.training.settings import Settings

    settings = Settings(**_flags(arguments, Settings))
    print(fit(settings=settings, **_flags(arguments, fit)))
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    """Has the model write text to learn from."""
    from lora_drop_vllm.generation.conversations import Generation
    from lora_drop_vllm.generation.generate import generate
    from lora_drop_vllm.training.corpus import read_corpus

    given = _flags(arguments, Generation)
    given = {**given, "system": tuple(given["system"]) or Generation.system}
    texts = read_corpus(arguments.corpus).documents
    openings = [text for text in texts if isinstance(text, str)]
    more = _flags(arguments, generate)
    print(generate(settings=Generation(**given), openings=openings, **more))
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    """Trains an adapter by gradients."""
    from lora_drop_vllm.training.gradient import Plan
    from lora_drop_vllm.training.settings import Settings
    from lora_drop_vllm.training.trainer import train

    settings = Settings(**_flags(arguments, Settings))
    plan = Plan(**_flags(arguments, Plan))
    print(train(settings=settings, plan=plan, **_flags(arguments, train)))
    return 0


def run_profile(arguments: argparse.Namespace) -> int:
    """Measures which layers may drop."""
    from lora_drop_vllm.training.profiler import profile
    from lora_drop_vllm.training.settings import Settings

    settings = Settings(**_flags(arguments, Settings))
    print(profile(settings=settings, **_flags(arguments, profile)))
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Scores an adapter beside its base model."""
    from lora_drop_vllm.evaluation.evaluate import evaluate
    from lora_drop_vllm.evaluation.served_answers import Decoding

    given = _flags(arguments, evaluate) | {
        "tasks": [name for name in arguments.tasks.split(",") if name],
        "decoding": Decoding(**_flags(arguments, Decoding)),
        "out": arguments.json,
    }
    print(evaluate(**given))
    return 0


def run_lm_eval(arguments: argparse.Namespace) -> int:
    """Runs lm-eval's own command, with our model added."""
    if arguments.arguments in ([], ["-h"], ["--help"]):
        print(LM_EVAL_HELP, end="")
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval: not installed; pip install 'lora_drop_vllm[eval]'")
    from lora_drop_vllm.evaluation.lm_eval_model import run

    run(arguments.arguments)
    return 0
