"""Training on the student's own answers, with a fake engine that gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_models import make_chat_model
from fake_generator import FakeEngine
from training_runs import STEPS, WORDS, assert_equal

from lora_drop_vllm.cli import main
from lora_drop_vllm.cli.parser import make_parser
from lora_drop_vllm.generation.conversations import Generation
from lora_drop_vllm.generation.generate import generate
from lora_drop_vllm.training import rollouts as module
from lora_drop_vllm.training.gradient import Trainer
from lora_drop_vllm.training.rows import Position, Row

EVERY = 5


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, conversations, text and the settings of a short run."""
    folder = tmp_path_factory.mktemp("rollouts")
    model = make_chat_model(folder / "model", "qwen2")
    talks = [
        [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": "A number, and a small one."},
        ]
        for n in range(12)
    ]
    lines = [json.dumps({"messages": talk}) for talk in talks]
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "text.txt").write_text(WORDS * 60)
    return ["train", str(model), "--corpus", str(folder / "talks.jsonl"), "--length", "96",
            "--rank", "4", "--rho", "0.5", "--steps", str(STEPS), "--batch", "2", "--warmup", "2",
            "--save-every", "3", "--from", "zero", "--no-bf16", "--rollouts", str(EVERY),
            "--rollout-prompts", "6"]  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[Any]]]:
    """Settings and prompts of each round, answered by a fake engine in this process."""
    rounds: list[tuple[dict[str, Any], list[Any]]] = []

    def run(command: list[str], stdout: int) -> Any:
        given = vars(make_parser("generate").parse_args(command[3:]))
        prompts = [json.loads(line) for line in given["prompts"].read_text().splitlines()]
        rounds.append((given, prompts))
        settings = Generation(given["seed"], given["max_tokens"], greedy=given["greedy"])
        more = {name: given[name] for name in ("batch", "prompts", "adapter")}
        generate(given["model"], given["out"], settings, start=FakeEngine().start, **more)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return rounds


def answers_in(rows: list[Row], decode: Callable[[list[int]], str]) -> float:
    """Share of the tokens that are answers of the fake engine."""
    ours = sum(len(row.tokens) for row in rows if "Number " in decode(row.tokens))
    return ours / sum(len(row.tokens) for row in rows)


def test_every_round_trains_on_new_answers_of_the_adapter(
    command: list[str], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rows = Trainer._backward, list[Row]()

    def watching(self: Trainer, chosen: Any, number: int) -> Any:
        rows.extend(chosen)
        return real(self, chosen, number)

    def at_the_start(self: module.Rollouts, step: int, *given: Any) -> Any:
        found = make_rows(self, step, *given)
        assert found.position.parts[-1] == Position()
        return found

    make_rows = module.Rollouts.rows
    monkeypatch.setattr(module.Rollouts, "rows", at_the_start)
    monkeypatch.setattr(Trainer, "_backward", watching)
    flags = ["--on-policy", "0.25", "--rollout-greedy", "0.75"]
    assert main([*command, *flags, "--out", str(tmp_path)]) == 0
    files = sorted(path.name for path in (tmp_path / module.FOLDER).iterdir())
    assert files == ["0.jsonl", "10.jsonl", "5.jsonl"]
    assert [len(prompts) for _, prompts in asked] == [6, 6, 6]
    texts = {prompt["messages"][-1]["content"] for _, prompts in asked for prompt in prompts}
    assert texts <= {f"What is {n}?" for n in range(12)} and len(texts) > 6
    assert len({given["seed"] for given, _ in asked}) == 3
    assert all(given["greedy"] == 0.75 for given, _ in asked)
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(command[1]).decode
    assert answers_in(rows, decode) == pytest.approx(0.25, abs=0.09)
    assert all(row.own == ("Number " in decode(row.tokens)) for row in rows)


def test_plain_prompts_are_completed_up_to_their_stop_strings(
    command: list[str], asked: Any, tmp_path: Path
) -> None:
    shots = [
        {"prompt": f"Q: {n}\nA:", "completion": f" {n}\n\nQ:", "stop": ["Q:"], "cut": True}
        for n in range(12)
    ]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(x) + "\n" for x in shots))
    more = ["--corpus", str(tmp_path / "shots.jsonl")]
    assert main([*command[:2], *more, *command[4:], "--out", str(tmp_path / "run")]) == 0
    prompts = [prompt for _, prompts in asked for prompt in prompts]
    assert len(prompts) == 18 and all(prompt["stop"] == ["Q:"] for prompt in prompts)
    assert {prompt["text"] for prompt in prompts} <= {shot["prompt"] for shot in shots}
    first = (tmp_path / "run" / module.FOLDER / "0.jsonl").read_text().splitlines()
    assert all(json.loads(line)["completion"].startswith("Number ") for line in first)


@pytest.mark.parametrize("step", [5, 7])
def test_a_killed_run_ends_alike(
    command: list[str], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    real = Trainer.advance

    def failing(self: Trainer) -> dict[str, float]:
        if self.step == step:
            raise RuntimeError("pulled the plug")
        return real(self)

    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(Trainer, "advance", failing)
    assert main([*command, "--out", str(tmp_path / "killed")]) == 2
    monkeypatch.setattr(Trainer, "advance", real)
    assert main([*command, "--out", str(tmp_path / "killed")]) == 0
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_a_new_run_asks_anew(command: list[str], asked: Any, tmp_path: Path) -> None:
    """Answers in the folder without a checkpoint are of another run."""
    old = tmp_path / "new" / module.FOLDER / "0.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"text": WORDS * 60}) + "\n")
    for name in ("new", "plain"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    assert_equal(tmp_path / "new", tmp_path / "plain")


def test_what_stops_a_run_is_said(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = str(Path(command[3]).with_name("text.txt"))
    out = ["--out", str(tmp_path)]
    assert main([*command[:2], "--corpus", text, *command[4:], *out]) == 2
    assert "--rollouts 5: the corpus has no conversations" in capsys.readouterr().err
    for flag, value, allowed in (
        ("on-policy", "1.5", "between 0 and 1"),
        ("rollouts", "-1", "0 or"),
        ("rollout-greedy", "-0.5", "0 to 1"),
        ("leave-loops", "-1.0", "0 or"),
    ):
        assert main([*command, f"--{flag}", value, *out]) == 2
        said = capsys.readouterr().err
        assert f"--{flag} {value}: expected" in said and allowed in said
    assert main([*command, "--leave-loops", "2", "--divergence", "reverse", *out]) == 2
    assert "--leave-loops 2.0 with --divergence reverse" in capsys.readouterr().err
    assert main([*command, "--leave-loops", "2", "--kl", "0", *out]) == 2
    assert "--leave-loops 2.0 with --kl 0" in capsys.readouterr().err
    assert main([*command, "--leave-loops", "2", "--rollouts", "0", *out]) == 2
    assert "--leave-loops 2.0 without --rollouts" in capsys.readouterr().err
    gone = SimpleNamespace(returncode=1)
    monkeypatch.setattr(module.subprocess, "run", lambda *command, **how: gone)
    assert main([*command, *out]) == 2
    assert "--rollouts: `" in (said := capsys.readouterr().err) and "to resume" in said
