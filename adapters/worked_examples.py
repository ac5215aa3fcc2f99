"""Writes prompts of worked examples, like those that the `rho` adapters learned to answer.

A prompt is plain text: some questions with answers, and a last question without one. They are word
problems with small numbers and, given conversations, users' turns with the first sentence of the
reply, and short exercises.

    python adapters/worked_examples.py a.jsonl b.jsonl --out asked.jsonl
    python adapters/worked_examples.py a.jsonl b.jsonl --examples 4 7 --out long.jsonl
    python adapters/worked_examples.py --marks --examples 2 8 --out marked.jsonl
    python adapters/worked_examples.py --marks --parts 2 3 --examples 2 4 --out chained.jsonl
    lora-drop generate MODEL --prompts asked.jsonl --max-tokens 192 --out shots.jsonl
"""

import argparse
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

NAMES = ["Ada", "Ben", "Carla", "Dmitri", "Eva", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira"]
THINGS = ["pears", "stamps", "marbles", "candles", "buttons", "shells", "tickets", "coins", "beads"]
KEYWORDS = [("Question", "Answer")] * 4 + [
    ("Q", "A"),
    ("Problem", "Solution"),
    ("Exercise", "Solution"),
    ("Task", "Answer"),
    ("User question", "Reply"),
]
ASKED = ["What is the sum of these numbers?", "What do the answers add up to?"]
ENDS = ["\n#### {}", "\nThe answer is {}.", "\nResult: {}", " So the answer is {}.", ""]
GAPS = ["\n\n", "\n\n", "\n\n", "\n---\n", "\n"]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

#: A question, and the sentences of its answer. (…) is a sum, [0] the value of the first one.
PROBLEMS: list[tuple[str, list[str]]] = [
    (
        "{n} has {d} {t} and gives {a} to {m}. How many {t} does {n} have left?",
        ["{n} has ({d} - {a}) {t} left."],
    ),
    (
        "A box holds {a} {t}. {n} fills {b} boxes and has {c} {t} over. How many {t} are there?",
        ["The boxes hold ({a} * {b}) {t}.", "With the rest there are ([0] + {c}) {t}."],
    ),
    (
        "{n} reads {a} pages a morning and {b} an evening. How many pages is that in {c} days?",
        ["{n} reads ({a} + {b}) pages a day.", "In {c} days that is ([0] * {c}) pages."],
    ),
    (
        "{n} is {d} years old. {m} is {a} years younger. How old will {m} be in {b} years?",
        ["{m} is ({d} - {a}) years old.", "In {b} years {m} will be ([0] + {b})."],
    ),
    (
        "One of the {t} costs {a} dollars. {n} buys {b} and pays with {paid}. What is the change?",
        ["The {t} cost ({a} * {b}) dollars.", "The change is ({paid} - [0]) dollars."],
    ),
    (
        "{ab} {t} are shared equally among {a} children. How many does each get?",
        ["Each child gets ({ab} / {a}) {t}."],
    ),
    (
        "A train goes {d} km in an hour. How far does it go in {c} hours?",
        ["It goes ({d} * {c}) km."],
    ),
    (
        "{n} has twice as many {t} as {m}, who has {d}. How many have they together?",
        ["{n} has (2 * {d}) {t}.", "Together they have ([0] + {d}) {t}."],
    ),
    (
        "There are {d} {t} in a jar. {a} are red, {c} are blue. How many are neither?",
        ["({d} - {a}) are not red.", "So ([0] - {c}) are neither."],
    ),
    (
        "{n} earns {a} dollars an hour and works {b} hours a day. How much is that in {c} days?",
        ["A day is worth ({a} * {b}) dollars.", "{c} days are worth ([0] * {c}) dollars."],
    ),
    (
        "A garden is {d} metres long and {a} wide. How long is the fence around it?",
        [
            "One long and one short side make ({d} + {a}) metres.",
            "The fence is (2 * [0]) metres long.",
        ],
    ),
    (
        "{n} plants {a} rows of {b} {t}. {c} do not grow. How many grow?",
        ["{n} plants ({a} * {b}) {t}.", "([0] - {c}) of them grow."],
    ),
    (
        "Half of the {dd} {t} belong to {n}, who sells {a} of them. How many are left to {n}?",
        ["{n} owns ({dd} / 2) {t}.", "After the sale ([0] - {a}) are left."],
    ),
    (
        "A baker makes {d} loaves a day and sells {a} of them. How many are left after {c} days?",
        ["Each day ({d} - {a}) loaves are left.", "After {c} days there are ([0] * {c})."],
    ),
]

#: How a sum and its value are written; without --marks always the first way.
MARKS: list[Callable[[str, int], str]] = [
    lambda term, value: f"{term} = {value}",
    lambda term, value: f"{term} = <<{term.replace(' ', '')}={value}>>{value}",
    lambda term, value: f"{term.replace(' ', '')} = <<{term.replace(' ', '')}={value}>>{value}",
    lambda term, value: f"<<{term.replace(' ', '')}={value}>>{value}",
    lambda term, value: f"{term} = [{term.replace(' ', '')}={value}] {value}",
    lambda term, value: f"({term}) => {value}",
    lambda term, value: f"<calc>{term}</calc> {value}",
]


class Solved(NamedTuple):
    """A question, the sentences of its answer, and the number that comes out, if any."""

    question: str
    sentences: list[str]
    result: int | None = None


def problem(rng: Random, mark: Callable[[str, int], str]) -> Solved:
    """A word problem of `PROBLEMS` with names, things and numbers drawn for it."""
    a, b, c, d = rng.randint(3, 12), rng.randint(3, 12), rng.randint(2, 9), rng.randint(22, 60)
    n, m = rng.sample(NAMES, 2)
    values = {"n": n, "m": m, "t": rng.choice(THINGS), "a": a, "b": b, "c": c, "d": d}
    values |= {"ab": a * b, "paid": a * b + c, "dd": 2 * d}
    question, sentences = rng.choice(PROBLEMS)
    results: list[int] = []

    def solved(match: re.Match[str]) -> str:
        left, sign, right = match[1].split()
        results.append(OPERATIONS[sign](int(left), int(right)))
        return mark(match[1], results[-1])

    answer = []
    for sentence in sentences:
        filled = sentence.format(**values).replace("[0]", str(results[0] if results else ""))
        answer.append(re.sub(r"\((\d+ . \d+)\)", solved, filled))
    return Solved(question.format(**values), answer, results[-1])


def chained(rng: Random, mark: Callable[[str, int], str], parts: int) -> Solved:
    """Several word problems in one, which asks for the sum of their results."""
    solved = [problem(rng, mark) for _ in range(parts)]
    if parts == 1:
        return solved[0]
    results = [part.result or 0 for part in solved]
    ask = rng.choice(ASKED)
    total = f"In all that is {mark(' + '.join(map(str, results)), sum(results))}."
    sentences = [sentence for part in solved for sentence in part.sentences]
    question = " ".join([*(part.question for part in solved), ask])
    return Solved(question, [*sentences, total], sum(results))


def turns(paths: list[Path]) -> list[Solved]:
    """The users' turns of conversations, with the first sentence of the reply."""
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            said = [m["content"] for m in json.loads(line)["messages"] if m["role"] != "system"]
            for question, reply in zip(said[::2], said[1::2], strict=False):
                first = re.split(r"(?<=[.!?])\s+", " ".join(reply.split()))[0]
                if 15 < len(question) < 140 and 2 < len(first) < 200:
                    found.append(Solved(" ".join(question.split()), [first]))
    return found


def exercises(rng: Random, words: list[str], count: int) -> tuple[tuple[str, str], list[Solved]]:
    """Short exercises of one kind, and their keywords."""
    kind = rng.choice(["Largest", "Letters", "Sorted", "Sum", "Length"])
    found = []
    for _ in range(count):
        numbers, some = rng.sample(range(1, 100), rng.randint(3, 6)), rng.sample(words, 3)
        asked, answer = {
            "Largest": (", ".join(map(str, numbers)), max(numbers)),
            "Letters": (some[0], " ".join(some[0])),
            "Sorted": (", ".join(some), ", ".join(sorted(some))),
            "Sum": (f"{numbers[0]} + {numbers[1]}", numbers[0] + numbers[1]),
            "Length": (some[0], len(some[0])),
        }[kind]
        found.append(Solved(asked, [str(answer)]))
    return ("Given", kind), found


def prompt(rng: Random, flags: argparse.Namespace, spoken: list[Solved]) -> dict[str, object]:
    """One line for `lora-drop generate --prompts`."""
    count, kind = rng.randint(*flags.examples) + 1, rng.random() if spoken else 0.0
    keywords, end, joint = rng.choice(KEYWORDS), rng.choice(ENDS), rng.choice(["\n", " "])
    if kind < 0.6:
        mark = rng.choice(MARKS) if flags.marks else MARKS[0]
        examples = [chained(rng, mark, rng.randint(*flags.parts)) for _ in range(count)]
    elif kind < 0.85:
        examples = rng.sample(spoken, count)
    else:
        words = sorted({w for solved in spoken for w in re.findall(r"[a-z]{4,9}", solved.question)})
        keywords, examples = exercises(rng, words, count + 2)
    (ask, reply), gap = keywords, rng.choice(GAPS)
    text = ""
    for example in examples[:-1]:
        ending = "" if example.result is None else end.format(example.result)
        text += f"{ask}: {example.question}\n{reply}: {joint.join(example.sentences)}{ending}{gap}"
    return {"text": f"{text}{ask}: {examples[-1].question}\n{reply}:", "stop": [f"{ask}:"]}


def main() -> None:
    """Writes the prompts that the flags describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("conversations", nargs="*", type=Path, help="files that `lora-drop generate` wrote")
    add("--out", type=Path, required=True)
    add("--count", type=int, default=600, help="prompts (600)")
    add("--examples", type=int, nargs=2, default=[1, 5], help="least and most in a prompt (1 5)")
    add("--parts", type=int, nargs=2, default=[1, 1], help="problems in one question (1 1)")
    add("--marks", action="store_true", help="write sums in seven ways, such as <<3*4=12>>12")
    add("--seed", type=int, default=0)
    flags = parser.parse_args()
    rng, spoken = Random(flags.seed), turns(flags.conversations)
    if flags.conversations and len(spoken) <= max(flags.examples):
        parser.error(
            f"{len(spoken)} short turns of users in {', '.join(map(str, flags.conversations))}: "
            f"--examples {' '.join(map(str, flags.examples))} takes more; write more conversations "
            "with `lora-drop generate --count`, or give none for word problems alone"
        )
    lines = [json.dumps(prompt(rng, flags, spoken)) + "\n" for _ in range(flags.count)]
    flags.out.write_text("".join(lines), encoding="utf-8")
    print(f"{flags.out}: {len(set(lines))} different prompts")


if __name__ == "__main__":
    main()
