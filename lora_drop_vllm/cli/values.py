"""A flag's default, and how its value is parsed; an error says what was expected."""

from __future__ import annotations

import inspect
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "model folder, or a name in the local Hugging Face cache"  # help of every command
ADAPTER = "adapter: a folder, or org/name or org/name@revision on the Hugging Face Hub"


def flag(
    parser: Any,
    source: Callable[..., Any],
    name: str,
    meaning: str,
    option: str = "",
    **more: Any,
) -> None:
    """Adds the flag of one parameter of `source` to a parser or a group, with its default.

    A default of False makes a switch; the help shows every other default but None.

    Args:
        source: dataclass or function that takes the value
        name: the parameter; it names the flag too, unless `option` does
        meaning: for `--help`, without the default
        more: for `add_argument`; `type` is that of the default unless it is given
    """
    default = inspect.signature(source).parameters[name].default
    option = option or f"--{name.replace('_', '-')}"
    if default is False:
        parser.add_argument(option, dest=name, action="store_true", help=meaning)
        return
    if default is not None:
        more = {"type": type(default)} | more
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        meaning += f" (default: {shown})"
    if "choices" not in more:
        more = {"metavar": METAVARS.get(more["type"])} | more
    parser.add_argument(option, dest=name, default=default, help=meaning, **more)


def layer_numbers(text: str) -> str | tuple[int, ...]:
    """Layers from `10-16` or `5,9,12`, ascending; a name stays a name."""
    if not text[:1].isdigit():
        return text
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentTypeError(f"{text}: expected layers such as 10-16 or 3,5,9")
        if dash and int(last) < int(first):
            raise ArgumentTypeError(f"{part}: expected the lower number first, {last}-{first}")
        layers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def only_numbers(text: str) -> tuple[int, ...]:
    """Layers as for `layer_numbers`, without a name."""
    layers = layer_numbers(text)
    if isinstance(layers, str):
        raise ArgumentTypeError(f"{text}: expected layers such as 10-16 or 3,5,9")
    return layers


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from `1,2,3`, each 1 or more."""
    return tuple(positive(part) for part in text.split(","))


def shares(text: str) -> tuple[float, ...]:
    """Numbers from `0.25,0.5`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"{text}: expected numbers such as 0.25,0.5") from error


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"{text}: expected a whole number, {least} or more")
    return int(text)


METAVARS: dict[Any, str] = {
    int: "N",
    count: "N",
    positive: "N",
    numbers: "N,...",
    float: "X",
    shares: "X,...",
    Path: "PATH",
}
