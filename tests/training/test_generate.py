"""`lora-drop generate` with a fake engine: the requests, the kept documents, kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_models import make_chat_tokenizer
from fake_generation import FAMILIES, FakeEngine, answer, is_user, made, said

from lora_drop_vllm.engine.offline_generation import Completion, Request
from lora_drop_vllm.training.chat import Conversation, render
from lora_drop_vllm.training.conversations import SYSTEMS, Generation
from lora_drop_vllm.training.turns import Turns


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_and_endings_are_the_templates(family: str) -> None:
    tokenizer = make_chat_tokenizer(family)
    turns, (user, reply, end) = Turns(tokenizer), FAMILIES[family]
    assert turns.system
    assert tokenizer.decode(turns.user_prompt([])) == user
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.decode(turns.reply_prompt(asked)) == reply
    for ending in (turns.user, turns.assistant):
        assert tokenizer.convert_ids_to_tokens(list(ending.tokens)) == [end] and not ending.text
    later = turns.user_prompt([*asked, {"role": "assistant", "content": "Ho"}])
    between = tokenizer.decode(later).removeprefix(reply)
    assert between.startswith(f"Ho{end}") and between.endswith(user[-len("user\n") :])


def test_a_turn_may_end_in_text_and_a_template_refuse_system_prompts() -> None:
    tokenizer = make_chat_tokenizer("bracketed")
    turns = Turns(tokenizer)
    assert not turns.system and turns.user.text == ("[/INST]",) and not turns.user.tokens
    assert tokenizer.decode(turns.user_prompt([])) == "[INST] "
    assert tokenizer.convert_ids_to_tokens(list(turns.assistant.tokens)) == ["</s>"]
    tokenizer.chat_template = "{{ messages[0].role }}"
    with pytest.raises(ValueError, match="leaves out a message of role user"):
        Turns(tokenizer)


def test_conversations_are_of_all_kinds(chat_model: str, tmp_path: Path) -> None:
    engine = FakeEngine()
    lines = made(chat_model, tmp_path / "a.jsonl", engine=engine, count=200)
    assert len(lines) == 200 and engine.batch == 16
    systems, turns = [], set()
    for line in lines:
        messages = line["messages"]
        if messages[0]["role"] == "system":
            systems.append(messages.pop(0)["content"])
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        turns.add(len(roles) // 2)
    assert set(systems) == set(SYSTEMS) and 70 < len(systems) < 130 and turns == {1, 2, 3}
    assert 70 < sum(line["greedy"] for line in lines) < 130
    users = [request for request in engine.asked if is_user(request)]
    assert {(r.temperature, r.top_p) for r in users} == {(1.0, 0.99)}
    replies = [request for request in engine.asked if not is_user(request)]
    assert {(r.temperature, r.top_p) for r in replies} == {(0.0, 1.0), (0.8, 1.0)}
    end = make_chat_tokenizer("qwen2").convert_tokens_to_ids("<|im_end|>")
    assert {request.stop for request in engine.asked} == {(end,)}
    assert len({request.seed for request in engine.asked}) > 0.99 * len(engine.asked)


def test_the_settings_decide_the_file_and_not_the_batch(chat_model: str, tmp_path: Path) -> None:
    first = made(chat_model, tmp_path / "a.jsonl")
    assert made(chat_model, tmp_path / "b.jsonl", batch=7) == first
    assert made(chat_model, tmp_path / "c.jsonl", count=15) == first[:15]
    assert made(chat_model, tmp_path / "c.jsonl", count=40) == first
    assert made(chat_model, tmp_path / "d.jsonl", Generation(seed=1, max_tokens=64)) != first


def test_a_repetition_of_what_was_dropped_is_none(chat_model: str, tmp_path: Path) -> None:
    """Half of the replies are broken; the batch size does not change which ones are kept."""

    def rule(request: Request) -> Completion:
        if is_user(request):
            return answer(f"Tell me about {request.seed % 20}, please.")
        return answer(said(request), "stop" if request.seed % 2 else "repetition")

    files = [
        made(chat_model, tmp_path / f"{n}.jsonl", engine=FakeEngine(rule), count=17, batch=n)
        for n in (1, 5, 50)
    ]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("call", [0, 3, 6, 8, 14])
def test_a_killed_run_resumes_to_the_same_file(chat_model: str, tmp_path: Path, call: int) -> None:
    def faulty(request: Request) -> Completion:
        return answer(said(request), "length" if request.seed % 5 == 0 else "stop")

    whole = made(chat_model, tmp_path / "a.jsonl", engine=FakeEngine(faulty), count=30, batch=8)
    out = tmp_path / "b.jsonl"
    with pytest.raises(KeyboardInterrupt):
        made(chat_model, out, engine=FakeEngine(faulty, dies=call), count=30, batch=8)
    with out.open("a") as file:  # from the current batch: a whole line, and a torn one
        file.write(json.dumps(whole[-1]) + '\n{"messages": [{"ro')
    engine = FakeEngine(faulty)
    assert made(chat_model, out, engine=engine, count=30, batch=8) == whole
    again = FakeEngine(faulty)
    assert made(chat_model, out, engine=again, count=30, batch=8) == whole and not again.asked
    side = [json.loads((tmp_path / f"{n}.jsonl.meta.json").read_text()) for n in "ab"]
    assert side[0] == side[1] and side[0]["engine"] == {"vllm": "fake"}
    assert side[0]["documents"] == 30 and side[0]["left_out"]["no end"] > 0
    assert side[0]["tokens"] == sum(line["tokens"] for line in whole)


@pytest.mark.parametrize(
    ("role", "turn", "fault"),
    [
        ("user", answer("How far is the moon?"), None),
        ("user", answer("How far is the", "length"), "no end"),
        ("assistant", answer("It is far away", "length"), None),
        ("user", answer("Hm"), "too short"),
        ("assistant", answer("   \n  "), "too short"),
        ("assistant", answer("Four."), None),
        ("assistant", answer("We go. " * 3, "repetition"), "repetition"),
        ("assistant", answer("We go on and on. " * 30, "length"), "repetition"),
        ("assistant", answer("".join(chr(33 + n * n * n % 89) for n in range(88))), None),
        ("user", answer("What is \N{REPLACEMENT CHARACTER} here?"), "stray tokens"),
        ("assistant", Completion("It is far", [40, 41, 42, 261, 44], "stop"), "stray tokens"),
    ],
    ids=lambda value: getattr(value, "text", value) and str(getattr(value, "text", value))[:12],
)
def test_broken_turns_are_told(role: str, turn: Completion, fault: str | None) -> None:
    assert Turns(make_chat_tokenizer("llama3")).fault(turn, role) == fault


def test_what_was_good_before_a_broken_turn_is_kept(chat_model: str, tmp_path: Path) -> None:
    """Second replies loop; third turns never follow."""

    def rule(request: Request) -> Completion:
        turn = make_chat_tokenizer("qwen2").decode(request.tokens).count("<|im_start|>user")
        return answer(said(request), "repetition" if turn == 2 and not is_user(request) else "stop")

    lines = made(chat_model, tmp_path / "a.jsonl", engine=FakeEngine(rule))
    assert all([m["role"] for m in x["messages"]][-2:] == ["user", "assistant"] for x in lines)
    assert all(sum(m["role"] == "user" for m in x["messages"]) == 1 for x in lines)


def test_a_reply_that_was_cut_off_ends_its_conversation_and_teaches_no_end(
    chat_model: str, tmp_path: Path
) -> None:
    def rule(request: Request) -> Completion:
        return answer(said(request), "stop" if is_user(request) else "length")

    (line, *_) = made(chat_model, tmp_path / "a.jsonl", engine=FakeEngine(rule), count=5)
    assert [m.get("cut") for m in line["messages"]][-2:] == [None, True]
    tokenizer = make_chat_tokenizer("qwen2")
    whole = [{k: v for k, v in m.items() if k != "cut"} for m in line["messages"]]
    (cut, full), _ = render([Conversation(line["messages"]), Conversation(whole)], tokenizer, 999)
    assert tokenizer.decode(list(full.tokens)).endswith("came.<|im_end|>")
    assert tokenizer.decode(list(cut.tokens)).endswith("came.")
    assert cut.prompt == full.prompt
