"""Conversations: replies after their prompts, in rows, under the schedule, in training."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer

from lora_drop_vllm.cli import main
from lora_drop_vllm.training.chat import Conversation, Reply, render
from lora_drop_vllm.training.checkpoint import LOG
from lora_drop_vllm.training.corpus import Corpus, read_corpus
from lora_drop_vllm.training.objective import predicting
from lora_drop_vllm.training.rows import Rows, random_schedule, stack

TEMPLATE = """{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}
{% endif %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}
{%- if add_generation_prompt %}<s>assistant\n{% endif %}"""


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def messages(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Messages of two roles that take turns."""
    roles = [first, "assistant" if first == "user" else "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def rendered(*chats: list[dict[str, str]], length: int = 200) -> tuple[list[Any], list[str]]:
    return render([Conversation.of(chat) for chat in chats], chat_tokenizer(), length)


def test_every_reply_stands_behind_its_prompt() -> None:
    found, reasons = rendered(messages("Hi", "Hello.", "Bees?", "They dance."))
    tokenizer = chat_tokenizer()
    parts = [
        (tokenizer.decode(list(r.tokens[: r.prompt])), tokenizer.decode(list(r.tokens[r.prompt :])))
        for r in found
    ]
    first = "<s>user\nHi</s>\n<s>assistant\n"
    assert not reasons and parts == [
        (first, "Hello.</s>"),
        (first + "Hello.</s>\n<s>user\nBees?</s>\n<s>assistant\n", "They dance.</s>"),
    ]


def test_a_long_reply_loses_its_end_and_a_long_prompt_is_none() -> None:
    found, reasons = rendered(
        messages("a" * 40, "b" * 300), messages("a" * 100, "b"), messages("c", "d"), length=96
    )
    assert [len(reply.tokens) for reply in found] == [96, 22]
    assert reasons == ["a prompt of 119 tokens leaves no room for a reply in --length 96"]


def test_what_the_template_refuses_is_counted() -> None:
    chats = [
        messages("Hi", "Hello."),
        [{"role": "judge", "content": "Order!"}, *messages("a", "b")],
    ]
    found, reasons = rendered(*chats)
    assert len(found) == 1 and reasons == ["the chat template refuses a conversation (no judges)"]
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}"
    _, reasons = render([Conversation.of(messages("a", "bcdefgh"))], tokenizer, 96)
    assert reasons == ["the chat template does not render a reply directly after its prompt"]


def test_without_a_template_or_a_reply_there_is_an_error() -> None:
    corpus = Corpus([Conversation(messages("Hi", "Hello."))], 0)
    with pytest.raises(ValueError, match="messages need a chat template, and the"):
        corpus.rendered(make_tokenizer(), 96)
    with pytest.raises(ValueError, match=r"no reply can be used; a prompt .* \(1 such replies\)"):
        corpus.rendered(chat_tokenizer(), 12)
    assert Corpus(["text"], 3).rendered(make_tokenizer(), 96) == Corpus(["text"], 3)


def test_conversations_are_read_beside_text(tmp_path: Path) -> None:
    chat = messages("Hi", "Hello.")
    good = [{"messages": chat}, {"text": "words", "messages": 3}, {"messages": chat, "id": 7}]
    bad = [
        {"messages": "Hi"},
        {"messages": []},
        {"messages": ["Hi", "Hello."]},
        {"messages": messages("Hi")},
        {"messages": messages("Hello.", "Hi", first="assistant")},
        {"messages": messages("Hi", " ")},
        {"messages": [{"role": "user", "content": ["Hi"]}, *chat]},
        {"messages": [{"content": "Hi"}, *chat]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*good, *bad]))
    found = read_corpus([path])
    assert found.documents == [Conversation(chat), "words", Conversation(chat)]
    assert found.skipped == len(bad)
    path.write_text(json.dumps(bad[0]))
    with pytest.raises(ValueError, match=r"line 1 is no JSON object .* a reply of the assistant"):
        read_corpus([path])


def mixed() -> Rows:
    chats = [Conversation(messages("a" * n, "b" * (50 - n), "c" * n, "d" * n)) for n in (4, 9, 20)]
    corpus = Corpus([*chats, "words " * 30, "more " * 50], 0)
    return Rows(corpus.rendered(chat_tokenizer(), 160), chat_tokenizer(), 160, seed=1)


def test_a_reply_stays_whole_and_only_it_counts() -> None:
    rows = mixed()
    chosen = list(islice(rows, 12))
    replies = {(tuple(p.tokens), p.prompt) for p in rows._passages if isinstance(p, Reply)}
    tokens, sequence = stack(chosen, 160)
    schedule = random_schedule(sequence, chosen, 3, seed=0, number=0)
    counts = torch.zeros(sequence.numel(), dtype=torch.bool)
    counts[predicting(schedule)] = True
    number = 0
    seen = set()
    for row in chosen:
        for piece, prompt in zip(torch.tensor(row.tokens).split(row.lengths), row.prompts):
            at = (sequence == number).flatten()
            if prompt:
                seen.add((tuple(piece.tolist()), prompt))
                kinds = schedule.full.flatten()[at]
                assert kinds[:prompt].all() and not kinds[prompt : prompt + 4].all()
                assert not counts[at][:prompt].any() and counts[at][prompt + 3 : -1].all()
            number += 1
    assert seen == replies and number > len(replies)


@pytest.mark.parametrize("start", [0, 2, 5])
def test_rows_of_replies_go_on_from_a_position(start: int) -> None:
    whole, again = mixed(), mixed()
    for _ in range(start):
        next(whole)
    again.position = whole.position
    assert [next(again) for _ in range(9)] == [next(whole) for _ in range(9)]


def test_the_commands_take_conversations(smooth_model: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(smooth_model, tmp_path / "model")
    chats = [messages(f"How are {n} bees?", "They dance. " * 5, "So?", "So.") for n in range(20)]
    chats.append(messages("long " * 40, "short"))
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    given = [str(tmp_path / "model"), "--corpus", str(tmp_path / "chat.jsonl"), "--length", "160",
             "--rank", "4", "--rho", "0.5"]  # fmt: skip
    assert main(["fit", *given, "--out", str(tmp_path / "fit")]) == 2
    assert "messages need a chat template" in capsys.readouterr().err.splitlines()[-1]
    chat_tokenizer().save_pretrained(tmp_path / "model")
    assert main(["fit", *given, "--out", str(tmp_path / "fit")]) == 0
    assert "; 1 lines or replies of the corpus could not be used" in capsys.readouterr().out
    steps = ["--steps", "2", "--batch", "2", "--from", str(tmp_path / "fit")]
    assert main(["train", *given, *steps, "--out", str(tmp_path / "train")]) == 0
    assert "; 1 lines or replies of the corpus could not be used" in capsys.readouterr().out
    assert len((tmp_path / "train" / LOG).read_text().splitlines()) == 2
