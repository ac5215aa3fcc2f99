"""Plain prompts among the prompts of a file: completed as they stand, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_models import make_chat_model, make_chat_tokenizer
from fake_generator import FakeEngine, answer
from tiny import make_adapter, make_tokenizer

from lora_drop_vllm.engine.offline_generation import Completion, Request
from lora_drop_vllm.generation.conversations import Generation
from lora_drop_vllm.generation.generate import generate
from lora_drop_vllm.training.chat import Conversation
from lora_drop_vllm.training.corpus import read_corpus

GREEDY = Generation(greedy=1.0, max_tokens=64)
SHOTS = "Q: 1 + 1\nA: 2\n\nQ: 2 + 3\nA:"
PLAIN = {"text": SHOTS, "stop": ["Q:", "###"]}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_chat_model(tmp_path_factory.mktemp("chat") / "model", "qwen2"))


def prompts(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(request: Request) -> Completion:
    return answer(" 5\n\nQ:" if request.stop_text else "Five, or so I think.")


def test_a_text_is_completed_as_it_stands_and_a_prompt_is_a_users_turn(
    chat_model: str, tmp_path: Path
) -> None:
    chat = {"prompt": "What is 2 + 3?"}
    path = prompts(tmp_path, PLAIN, chat, {"text": "In 1905,"}, PLAIN)
    engine = FakeEngine(said)
    out = tmp_path / "a.jsonl"
    generate(chat_model, out, GREEDY, prompts=path, start=engine.start)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["messages"][1]["content"] == "Five, or so I think."
    assert (lines[0]["prompt"], lines[0]["completion"]) == (SHOTS, " 5\n\nQ:")
    assert lines[0]["stop"] == PLAIN["stop"] and lines[0]["cut"] and not lines[2]["cut"]
    tokenizer = make_chat_tokenizer("qwen2")
    plain = [request for request in engine.asked if not request.stop]
    assert [tokenizer.decode(r.tokens) for r in plain] == [SHOTS, "In 1905,", SHOTS]
    assert [r.stop_text for r in plain] == [("Q:", "###"), (), ("Q:", "###")]


def test_completions_are_replies_to_their_prompts_in_training(
    chat_model: str, tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    path = prompts(tmp_path, PLAIN, {"text": "In 1905,"})
    generate(chat_model, out, GREEDY, prompts=path, start=FakeEngine(said).start)
    corpus = read_corpus([out])
    assert [document.stop for document in corpus.documents] == [("Q:", "###"), ()]
    tokenizer = make_chat_tokenizer("qwen2")
    found = corpus.rendered(tokenizer, 200).documents
    parts = [
        (tokenizer.decode(list(r.tokens[: r.prompt])), tokenizer.decode(list(r.tokens[r.prompt :])))
        for r in found
    ]
    end = tokenizer.eos_token
    assert parts == [(SHOTS, " 5\n\nQ:"), ("In 1905,", f"Five, or so I think.{end}")]
    tokenizer.eos_token = None
    _, endless = read_corpus([out]).rendered(tokenizer, 200).documents
    assert tokenizer.decode(list(endless.tokens[endless.prompt :])) == "Five, or so I think."
    with pytest.raises(ValueError, match="a prompt of 26 tokens leaves no room for a reply"):
        read_corpus([out]).rendered(make_tokenizer(), 8)


def test_a_conversation_with_a_completion_stays_a_conversation(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    path = prompts(tmp_path, {"messages": talk, "completion": "Hello."})
    assert read_corpus([path]).documents == [Conversation(talk)]


def test_loops_are_kept_of_a_student_only(chat_model: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", Path(chat_model), drop_layers=[3, 5])
    path = prompts(tmp_path, PLAIN, {"text": "In 1905,"})
    for name, more, kept in (("base", {}, 0), ("ours", {"adapter": tmp_path / "adapter"}, 2)):
        engine = FakeEngine(lambda request: answer("and so on " * 40, "repetition"))
        out = tmp_path / f"{name}.jsonl"
        generate(chat_model, out, GREEDY, prompts=path, start=engine.start, **more)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(lines) == kept and all(line["cut"] for line in lines)


def test_a_model_without_a_template_completes_plain_prompts_whole(
    smooth_model: Path, tmp_path: Path
) -> None:
    engine = FakeEngine(said)
    path = prompts(tmp_path, PLAIN, {"text": "far " * 100})
    generate(str(smooth_model), tmp_path / "a.jsonl", GREEDY, prompts=path, start=engine.start)
    lengths = [len(make_tokenizer()(text).input_ids) for text in (SHOTS, "far " * 100)]
    assert [len(request.tokens) for request in engine.asked] == lengths
    path = prompts(tmp_path, PLAIN, {"prompt": "How far?"}, PLAIN, {"prompt": "In 1905,"})
    out = tmp_path / "b.jsonl"
    generate(str(smooth_model), out, GREEDY, prompts=path, start=engine.start)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["text"] == "How far?Five, or so I think."
    assert lines[3]["text"] == "In 1905,Five, or so I think." and lines[2]["prompt"] == SHOTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": " "}, "line 1 has an empty `text`"),
        ({"text": "Hi", "stop": "Q:"}, "line 1 has stop 'Q:': expected a list of strings"),
        ({"text": "Hi", "stop": [""]}, r"line 1 has stop \[''\]: expected a list of strings"),
        ({"words": "Hi"}, "line 1 has neither a `text` nor"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(
    chat_model: str, tmp_path: Path, line: dict[str, object], message: str
) -> None:
    path = prompts(tmp_path, line)
    with pytest.raises(ValueError, match=message):
        generate(chat_model, tmp_path / "a.jsonl", GREEDY, prompts=path)
