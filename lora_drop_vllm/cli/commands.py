"""The commands of `lora-drop`: each calls what does the work, imported when it is asked for.

They return the exit status.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import fields
from typing import Any

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


def _settings(arguments: argparse.Namespace, **given: Any) -> Any:
    from lora_drop_vllm.training.settings import Settings

    flags = {f.name for f in fields(Settings)} & vars(arguments).keys()
    return Settings(**{**{name: getattr(arguments, name) for name in flags}, **given})


def run_demo(arguments: argparse.Namespace) -> int:
    """The quick start."""
    from lora_drop_vllm.cli import demo

    demo.run(demo.settings(arguments), arguments.tokens, arguments.port)
    return 0


def run_fit(arguments: argparse.Namespace) -> int:
    """An adapter in closed form."""
    from lora_drop_vllm.training.fit import fit

    settings = _settings(arguments)
    print(fit(arguments.model, arguments.corpus, settings, arguments.out, arguments.profile))
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    """An adapter by gradients."""
    from lora_drop_vllm.training.gradient import Plan
    from lora_drop_vllm.training.trainer import train

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


def run_profile(arguments: argparse.Namespace) -> int:
    """Which layers may drop."""
    from lora_drop_vllm.training.profiler import profile

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


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Quality beside the base model."""
    from lora_drop_vllm.evaluation.evaluate import evaluate
    from lora_drop_vllm.evaluation.served_answers import Decoding

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


def run_cost(arguments: argparse.Namespace) -> int:
    """KV and ideal speed over rho and k."""
    from lora_drop_vllm.cli.cost import cost

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


def run_lm_eval(arguments: argparse.Namespace) -> int:
    """lm-eval's own command, which then knows our model."""
    if arguments.arguments in ([], ["-h"], ["--help"]):
        print(LM_EVAL_EXAMPLES, end="")
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval: not installed; pip install 'lora_drop_vllm[eval]'")
    from lora_drop_vllm.evaluation.lm_eval_model import run

    run(arguments.arguments)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Whether a model and an adapter fit."""
    from lora_drop_vllm.cli.check import check

    print(check(arguments.model, arguments.adapter, as_json=arguments.json))
    return 0
