"""`--help`: examples that parse, defaults and choices from where they are used."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from lora_drop_vllm import Decoding, Plan, Settings, cost, evaluate, profile, train
from lora_drop_vllm.cli import demo, main
from lora_drop_vllm.cli.cost import BYTES
from lora_drop_vllm.cli.parser import COMMANDS, make_parser
from lora_drop_vllm.decode.masks import BACKENDS
from lora_drop_vllm.method.reuse import KV_MODES, REUSE, SITES
from lora_drop_vllm.playground.answers import Sampling
from lora_drop_vllm.playground.launch import open_page
from lora_drop_vllm.training.settings import CRITERIA, DTYPES, RHO

# what takes the values of a command's flags
TAKERS: list[tuple[str, Any]] = [
    ("demo", demo.settings),
    ("demo", demo.run),
    ("cost", cost),
    ("fit", Settings),
    ("train", Settings),
    ("train", Plan),
    ("train", train),
    ("profile", Settings),
    ("profile", profile),
    ("evaluate", Decoding),
    ("evaluate", evaluate),
    ("playground", open_page),
    ("playground", Sampling),
]
NO_FLAG = {
    ("profile", Settings): {"rho", "layers", "drop_attention", "dtype"},  # it makes no adapter
    ("evaluate", evaluate): {"decoding", "out"},  # a dataclass; --json
    ("playground", Sampling): {"top_p", "seed"},  # the page has them
}
OTHER_DEFAULT = {("profile", "tokens"): 16384, ("evaluate", "tasks"): ""}
CHOICES = [
    *((command, *pair) for command in ("fit", "train") for pair in (("dtype", DTYPES),)),
    *((command, *pair) for command in ("fit", "train", "profile")
      for pair in (("reuse", REUSE), ("kv", KV_MODES), ("injection", SITES))),
    ("train", "attention", BACKENDS),
    ("profile", "criterion", CRITERIA),
    ("cost", "dtype", BYTES),
]  # fmt: skip


def actions(command: str) -> dict[str, argparse.Action]:
    """Flags and arguments of a command, by the name of what takes them."""
    (commands,) = (
        a for a in make_parser(command)._actions if a.dest == "==SUPPRESS==" and a.choices
    )
    return {action.dest: action for action in commands.choices[command]._actions}  # type: ignore


@pytest.mark.parametrize("command", [*COMMANDS, "lm-eval"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main([command, "--help"])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr().out
    assert status == 0 and f"lora-drop {command} " in said.partition("\nexamples:\n")[2] + " "


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str) -> None:
    for example in COMMANDS[command].examples:
        words = shlex.split(example)
        arguments = make_parser(command).parse_args(words[words.index(command) :])
        assert arguments.run is COMMANDS[command].run


@pytest.mark.parametrize(("command", "taker"), TAKERS, ids=lambda v: getattr(v, "__name__", v))
def test_defaults_are_those_of_what_takes_them(command: str, taker: Any) -> None:
    """A new setting without a flag fails here too."""
    flags = actions(command)
    for name, parameter in inspect.signature(taker).parameters.items():
        if parameter.default is inspect.Parameter.empty or name in NO_FLAG.get(
            (command, taker), ()
        ):
            continue
        default = OTHER_DEFAULT.get((command, name), parameter.default)
        assert flags[name].default == default, name
        if default not in (None, False, "", ()):
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            assert f"(default: {shown})" in str(flags[name].help), name
    if taker is Settings and "rho" in flags:
        assert f"(default: {RHO})" in str(flags["rho"].help)


@pytest.mark.parametrize(("command", "name", "allowed"), CHOICES)
def test_choices_are_those_of_the_tables(
    command: str, name: str, allowed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert actions(command)[name].choices == allowed
    words = shlex.split(COMMANDS[command].examples[0])[1:]
    with pytest.raises(SystemExit) as left:
        main([*words, f"--{name}", "best"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and all(repr(value) in error for value in allowed)


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("cost", ["--rho", "a,b"], "argument --rho: a,b: expected numbers such as 0.25,0.5"),
        ("cost", ["--k", "1,0"], "argument --k: 0: expected a whole number, 1 or more"),
        ("cost", ["--prompt", "-1"], "argument --prompt: -1: expected a whole number, 0 or more"),
        ("cost", ["--prompt", "1.5"], "argument --prompt: 1.5: expected a whole number, 0 or more"),
        ("fit", ["--layers", "10-x"], "argument --layers: 10-x: expected layers such as 10-16"),
        ("fit", ["--layers", "3,,5"], "argument --layers: 3,,5: expected layers such as 10-16"),
    ],
)
def test_values_that_cannot_be_parsed_are_explained(
    command: str, flag: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*shlex.split(COMMANDS[command].examples[0])[1:], *flag])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_list_of_commands_needs_no_torch() -> None:
    code = (
        "import sys\nfrom lora_drop_vllm.cli import main\n"
        "try: main(['--help'])\nfinally: print([m for m in sys.modules if m == 'torch'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.endswith("[]\n")
    listed = re.findall(r"^    ([\w-]+)\s", found.stdout, re.MULTILINE)
    assert listed == [*COMMANDS, "lm-eval"]
