"""Prompts of worked examples (`adapters/worked_examples.py`): true sums, an open end, seeded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "adapters" / "worked_examples.py"


def prompts(out: Path, *flags: object) -> list[dict]:
    subprocess.run([sys.executable, SCRIPT, *map(str, flags), "--out", out], check=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("flags", [(), ("--marks",), ("--marks", "--parts", 2, 3)], ids=str)
def test_every_sum_is_right_and_every_way_to_write_it_occurs(tmp_path, flags):
    lines = prompts(tmp_path / "asked.jsonl", "--count", 80, *flags)
    text = "\n".join(line["text"] for line in lines)
    sums = re.findall(r"((?:\d+ ?[-+*/] ?)+\d+)(?: = |=|\) => |</calc> )(\d+)", text)
    assert len(sums) > 200
    for term, value in sums:
        assert eval(term) == int(value), term
    marks = [mark for mark in ("<<", "] ", "=> ", "<calc>") if mark in text]
    assert len(marks) == (4 if "--marks" in flags else 0)


def test_the_last_question_is_open_and_the_next_one_ends_the_completion(tmp_path):
    for line in prompts(tmp_path / "asked.jsonl", "--count", 20, "--examples", 2, 2):
        ask, (stop,) = line["text"].split(":")[0], line["stop"]
        assert stop == f"{ask}:"
        assert line["text"].count(stop) == 3
        assert line["text"].endswith(":")


def test_conversations_give_turns_and_exercises(tmp_path):
    said = [f"Which of the rivers number {n} is the longest one here?" for n in range(9)]
    turns = [{"role": "user", "content": q} for q in said]
    reply = {"role": "assistant", "content": "It is the Nile. There are others."}
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(json.dumps({"messages": [turn, reply]}) + "\n" for turn in turns))
    text = "\n".join(p["text"] for p in prompts(tmp_path / "a.jsonl", talk, "--count", 60))
    assert ": It is the Nile.\n" in text
    assert "There are others" not in text
    assert "Given: " in text


def test_too_few_conversations_are_refused_by_name(tmp_path):
    talk = tmp_path / "talk.jsonl"
    talk.write_text('{"messages": []}\n')
    command = [sys.executable, SCRIPT, talk, "--out", tmp_path / "asked.jsonl"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "0 short turns of users in" in refused.stderr
    assert "--examples 1 5 takes more" in refused.stderr


def test_the_seed_decides(tmp_path):
    first, again, other = (
        prompts(tmp_path / "asked.jsonl", "--count", 5, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
