"""Rollouts: figures and intervals, the shipped prompts, and the command with a fake server."""

from __future__ import annotations

import json
import math
import random
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat import LIKED, MAX_LEN, OTHER, ChatFake

from lora_drop_vllm.cli import main
from lora_drop_vllm.evaluation.rollout_report import (
    Figure,
    distinct,
    loop_start,
    loops,
    same_start,
)
from lora_drop_vllm.evaluation.rollouts import CHAT_PROMPTS
from lora_drop_vllm.evaluation.significance import Estimate, mean, share, share_difference

ROOT = Path(__file__).parents[2]
PHRASE = " ".join(f"w{n}" for n in range(8))
MOST = 30  # tokens of an answer


@pytest.fixture
def fake() -> Iterator[Callable[..., ChatFake]]:
    """Starts a server; a function of the prompt and of k = 0 gives its answers."""
    running: list[ChatFake] = []

    def start(say: Callable[[str, bool], str]) -> ChatFake:
        running.append(ChatFake(say, liked={"one", "two", "three"}))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("Count\nLoop forever\n\nCount again\n")
    return path


def say(prompt: str, base: bool) -> str:
    """LoRA-Drop loops where it can, and strays once."""
    if base:
        return "one two three"
    return f"{PHRASE} {PHRASE} {PHRASE} {PHRASE}" if "Loop" in prompt else "one two astray"


def command(server: ChatFake, prompts: Path, *more: str) -> list[str]:
    given = ["evaluate", "--url", server.url, "--rollouts", str(prompts)]
    return [*given, "--max-tokens", str(MOST), *more]


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([*range(8)] * 3, True),
        ([9, 9, *([*range(8)] * 3), 9], True),
        (([*range(8)] * 3)[:-1], False),
        ([*range(8), 8] * 2 + [*range(8), 9], False),
        ([*range(7)] * 5, False),  # too short a phrase, unless twice of it is one
        ([*range(7)] * 6, True),
        ([5] * 23, False),
        ([5] * 24, True),
        ([*range(128)] * 3, True),
        ([*range(129)] * 3, False),
        ([], False),
    ],
)
def test_a_loop_is_a_phrase_three_times_in_a_row(ids: list[int], found: bool) -> None:
    assert loops(ids) is found


def test_a_loop_starts_at_its_first_phrase() -> None:
    """At the earliest of several loops, whatever their sizes."""
    short, long = [*range(8)], [*range(20, 40)]
    assert loop_start([9, 9, *short * 3]) == 2
    assert loop_start([9, *long * 3, *short * 4]) == 1
    assert loop_start([*short * 2]) is None


def test_distinct_runs_and_same_starts() -> None:
    ids = [1, 2, 1, 2, 1]
    assert [distinct(ids, size) for size in (1, 2, 3)] == [2 / 5, 2 / 4, 2 / 3]
    assert distinct([1, 2], 3) == distinct([], 1) == 1
    assert same_start([1, 2, 3], [1, 2, 4, 5]) == 2 / 4
    assert same_start([1, 2], [1, 2]) == 1 and same_start([3, 2], [1, 2]) == 0
    assert same_start([7] * 99, [7] * 32 + [8]) == 1


def near(estimate: Estimate, *wanted: float) -> bool:
    found = (estimate.value, estimate.low, estimate.high)
    return all(math.isclose(a, b, abs_tol=5e-5) for a, b in zip(found, wanted))


def marks(true: int, false: int) -> list[bool]:
    return [True] * true + [False] * false


def test_intervals_of_shares_are_the_published_ones() -> None:
    """Newcombe's examples of 1998: Wilson's interval, and that of paired shares."""
    assert near(share(marks(81, 182)), 0.3080, 0.2553, 0.3662)
    assert near(share(marks(0, 20)), 0, 0, 0.1611)
    ours = marks(36, 0) + marks(12, 0) + marks(0, 2)
    base = marks(36, 0) + marks(0, 12) + marks(2, 0)
    assert near(share_difference(ours, base), 0.2, 0.0569, 0.3404)
    same = share_difference(marks(3, 7), marks(3, 7))
    assert same.low < same.value == 0 < same.high  # equal marks leave it uncertain


def test_intervals_of_means_hold_the_truth_as_often_as_they_say() -> None:
    drawn = random.Random(0)
    held = 0
    for _ in range(60):
        found = mean([drawn.gauss(2, 1) for _ in range(60)])
        held += found.low <= 2 <= found.high
    assert 52 <= held < 60
    assert mean([1.0, 2.0, 3.0]) == mean([1.0, 2.0, 3.0])


def test_differences_are_paired_by_prompt() -> None:
    base = [float(n) for n in range(50)]
    figure = Figure.of([value + 1 for value in base], base)
    assert figure.difference == Estimate(1, 1, 1)
    assert figure.base.high - figure.base.low > 5


def test_200_different_prompts_ship_with_the_wheel() -> None:
    prompts = CHAT_PROMPTS.read_text().splitlines()
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts) == 200
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    lengths = sorted(len(prompt.split()) for prompt in prompts)
    assert lengths[20] <= 6 and lengths[-10] >= 30  # short and long ones
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = setuptools["package-data"]["lora_drop_vllm.evaluation"]
    assert CHAT_PROMPTS.name in shipped and CHAT_PROMPTS.parent.name == "evaluation"


def test_the_command_compares_the_answers_of_both(
    fake: Any, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(say), tmp_path / "out.json"
    assert main(command(server, prompts, "--json", str(out))) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())["rollouts"]
    assert (found["prompts"], found["examples"], found["skipped"]) == ("prompts.txt", 3, 0)
    assert found["base"] == {"tokens": 12, "cut_off": 0, "full_steps": 12, "lora_steps": 0}
    assert found["lora_drop"]["tokens"] == 4 + MOST + 4 and found["lora_drop"]["lora_steps"] == 28

    def figure(name: str, who: str = "lora_drop") -> Any:
        return pytest.approx(found["figures"][name][who]["value"])

    assert figure("tokens") == (4 + MOST + 4) / 3 and figure("tokens", "base") == 4
    for name in ("cut_off", "loops"):
        assert figure(name) == figure(name, "difference") == 1 / 3 and figure(name, "base") == 0
        assert found["figures"][name]["difference"]["low"] < 0  # three prompts say little
    assert figure("distinct_3") == (1 + 8 / 28 + 1) / 3 and figure("distinct_3", "base") == 1
    liked, other = math.log(LIKED[0]), math.log(OTHER[0])
    astray = (3 * liked + other) / 4
    assert figure("logprob", "base") == liked and figure("logprob") == (2 * astray + other) / 3
    assert figure("first_choice") == (0.75 + 0 + 0.75) / 3 and figure("first_choice", "base") == 1
    assert found["same_start"]["value"] == pytest.approx((2 / 4 + 0 + 2 / 4) / 3)
    loop = found["answers"][1]
    assert loop["messages"] == [{"role": "user", "content": "Loop forever"}]
    assert loop["lora_drop"]["text"].startswith(PHRASE) and loop["lora_drop"]["loops"]
    assert loop["base"]["text"] == "one two three" and not loop["base"]["cut_off"]
    assert "prompts.txt: 3 prompts, 0 skipped" in printed
    assert "loops, %          33.3 [6.1, 79.2]            0.0 [0.0, 56.1]" in printed
    assert "of the first 32 tokens, 33.3 [0.0, 50.0] % are the same" in printed


def test_the_base_model_answers_alone_then_lora_drop_then_it_scores(
    fake: Any, prompts: Path
) -> None:
    pair = threading.Barrier(2)  # two requests at a time

    def together(prompt: str, base: bool) -> str:
        if "Count" in prompt:
            pair.wait(timeout=60)
        return say(prompt, base)

    server = fake(together)
    prompts.write_text("Count\nCount again\n")
    assert main(command(server, prompts, "--concurrency", "2")) == 0
    kinds = [
        "score" if "prompt_logprobs" in body else "base" if "vllm_xargs" in body else "LoRA-Drop"
        for body in server.asked
    ]
    assert kinds == ["base"] * 2 + ["LoRA-Drop"] * 2 + ["score"] * 4
    assert not server.overlapped
    for body in server.asked[:4]:
        assert (body["temperature"], body["repetition_penalty"], body["top_p"]) == (0, 1, 1)
        assert body["max_tokens"] == MOST
    assert all(body["vllm_xargs"] == {"lora_drop_k": 0} for body in server.asked[4:])


def test_a_temperature_draws_the_tokens_of_rollouts_only(
    fake: Any, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(say)
    assert main(command(server, prompts, "--temperature", "0.7", "--limit", "1")) == 0
    assert [body["temperature"] for body in server.asked] == [0.7, 0.7, 0, 0]  # the last two score
    for wrong, message in (("-1", "--temperature -1.0: expected 0"), ("1", "decoded greedily")):
        task = ["--tasks", str(tmp_path / "gsm8k.jsonl")]
        assert main(["evaluate", "--url", server.url, *task, "--temperature", wrong]) == 2
        assert message in capsys.readouterr().err


def test_refused_prompts_are_left_out_for_both(
    fake: Any, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picky(prompt: str, base: bool) -> str:
        if "again" in prompt and not base:
            raise ValueError("this prompt is\ntoo dull")
        return say(prompt, base)

    prompts.write_text(f"{prompts.read_text()}{'word ' * (MAX_LEN - 1)}\n")
    assert main(command(fake(picky), prompts)) == 0
    printed = capsys.readouterr().out
    assert "prompts.txt: 2 prompts, 2 skipped (" in printed and "this prompt is too dull" in printed
    prompts.write_text("Count again\n")
    assert main(command(fake(picky), prompts)) == 2
    assert "prompts.txt: the server refuses every prompt: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base_steps", "our_steps", "message"),
    [(0, 0, "no LoRA step ran in"), (1, 1, "3 LoRA steps ran although"), (None, None, "without")],
    ids=["none", "strangers", "stock"],
)
def test_rollouts_that_show_nothing_are_an_error(
    fake: Any,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    base_steps: int | None,
    our_steps: int,
    message: str,
) -> None:
    server = fake(say)
    if base_steps is None:
        server.steps.clear()
    server.lora_steps = lambda base, tokens: base_steps if base else our_steps
    assert main(command(server, prompts)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_file_without_prompts_is_refused(
    fake: Any, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text("\n")
    assert main(command(fake(say), prompts)) == 2
    assert f"--rollouts {prompts}: empty" in capsys.readouterr().err
