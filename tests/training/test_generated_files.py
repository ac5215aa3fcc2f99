"""`lora-drop generate`: duplicates, files, prompts, and models without a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_models import make_chat_model
from fake_generation import FakeEngine, answer, is_user, made, said
from tiny import make_tokenizer

from lora_drop_vllm.engine.offline_generation import Completion, Request
from lora_drop_vllm.training.conversations import Generation
from lora_drop_vllm.training.generate import BARREN, read_prompts
from lora_drop_vllm.training.generated_file import alone


def test_no_turn_comes_again(chat_model: str, tmp_path: Path) -> None:
    """No first turn repeats in a file, no turn in a conversation, and no turn of excluded files."""

    def rule(request: Request) -> Completion:
        if is_user(request):
            return answer(f"Tell me  ABOUT {request.seed % 30}")
        return answer(said(request))

    def turns(line: dict[str, Any]) -> list[str]:
        return [m["content"] for m in line["messages"] if m["role"] == "user"]

    first = made(chat_model, tmp_path / "a.jsonl", engine=FakeEngine(rule), count=12, batch=5)
    openings = [turns(line)[0] for line in first]
    assert len(set(openings)) == 12
    assert all(len(set(turns(line))) == len(turns(line)) for line in first)
    more = {"exclude": [tmp_path / "a.jsonl"], "count": 8}
    seed = Generation(seed=5, max_tokens=64)
    other = made(chat_model, tmp_path / "b.jsonl", seed, FakeEngine(rule), **more)
    used = {turn for line in first for turn in turns(line)}
    assert len(other) == 8 and not used & {turn for line in other for turn in turns(line)}


def test_a_model_that_says_nothing_useful_is_given_up(chat_model: str, tmp_path: Path) -> None:
    engine = FakeEngine(lambda request: answer("Hm"))
    with pytest.raises(RuntimeError, match=f"the last {BARREN} attempts gave .*'too short': 256"):
        made(chat_model, tmp_path / "a.jsonl", engine=engine)


def test_another_runs_file_is_left_alone(chat_model: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    made(chat_model, out, count=5)
    with pytest.raises(ValueError, match=r"a\.jsonl: made with turns 3, not 2; resume it"):
        made(chat_model, out, Generation(turns=2, max_tokens=64))
    other = str(make_chat_model(tmp_path / "model", "qwen2", "smollm2"))
    with pytest.raises(ValueError, match="made with digest"):
        made(other, out)
    (tmp_path / "notes.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(ValueError, match=r"not what `lora-drop generate` writes .*No such file"):
        made(chat_model, tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == '{"text": "mine"}\n'
    out.write_text("")
    with pytest.raises(ValueError, match="5 documents expected, 0 found"):
        made(chat_model, out)


def test_a_file_has_one_writer_at_a_time(tmp_path: Path) -> None:
    import fcntl

    with alone(tmp_path / "new" / "a.jsonl"), (tmp_path / "new" / "a.jsonl").open("a") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_prompts_of_a_file_are_answered_once(chat_model: str, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    late = [*chat, {"role": "assistant", "content": "Hello."}]
    lines = [{"prompt": "How far is it?"}, {"messages": chat}, {"messages": late}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = FakeEngine()
    greedy = Generation(greedy=1.0, max_tokens=64)
    got = made(chat_model, tmp_path / "a.jsonl", greedy, engine, prompts=path, count=None)
    assert [line["messages"][:-1] for line in got] == [
        [{"role": "user", "content": "How far is it?"}], chat, chat,
    ]  # fmt: skip
    assert {request.temperature for request in engine.asked} == {0.0} and len(engine.asked) == 3
    long = tmp_path / "p.txt"
    long.write_text("How far is it?\n\n" + "far " * 900 + "\n")
    got = made(chat_model, tmp_path / "b.jsonl", greedy, prompts=long, count=None)
    assert [line["messages"][0]["content"] for line in got] == ["How far is it?"]
    side = json.loads((tmp_path / "b.jsonl.meta.json").read_text())
    assert side["left_out"] == {"too long": 1} and side["attempts"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "line 1 has neither a `prompt` nor"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1 has neither"),
        ("[]", "line 1 has neither"),
        ("{", "cannot be used"),
        ("", "empty; name a file"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("openings", [(), ("Once upon a time there was a bee. " * 9, "In 1905,")])
def test_a_model_without_a_template_continues(
    smooth_model: Path, tmp_path: Path, openings: tuple[str, ...]
) -> None:
    engine = FakeEngine()
    got = made(str(smooth_model), tmp_path / "a.jsonl", engine=engine, openings=openings, count=9)
    tokenizer = make_tokenizer()
    starts = [text[:32] for text in openings] or [""]
    for number, (line, request) in enumerate(zip(got, engine.asked)):
        start = starts[number % len(starts)]
        assert line["text"] == start + said(request)
        assert request.tokens == (tokenizer(start).input_ids if openings else [1])
    assert {line["greedy"] for line in got} == ({True, False} if openings else {False})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Generation(max_tokens=3), "--max-tokens 3: expected 16 or more"),
        (Generation(turns=0), "--turns 0: expected 1 or more"),
        (Generation(greedy=1.5), "--greedy 1.5: expected 0 to 1"),
        (Generation(temperature=0), "--temperature 0: expected more than 0; see --greedy"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    chat_model: str, tmp_path: Path, settings: Generation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(chat_model, tmp_path / "a.jsonl", settings)
