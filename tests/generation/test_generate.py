"""`lora-drop generate` with a fake engine: the requests, the kept documents, kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_models import make_chat_model, make_chat_tokenizer
from fake_generator import FakeEngine, answer, is_user, said
from tiny import make_adapter, make_tokenizer

from lora_drop_vllm.engine.offline_generation import Completion, Request
from lora_drop_vllm.generation.conversations import SYSTEMS, Generation
from lora_drop_vllm.generation.generate import BARREN, generate
from lora_drop_vllm.generation.generated_file import alone
from lora_drop_vllm.training.chat import Conversation, render

PLAIN = Generation(max_tokens=64)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_chat_model(tmp_path_factory.mktemp("chat") / "model", "qwen2"))


def made(
    model: str,
    out: Path,
    settings: Generation = PLAIN,
    engine: FakeEngine | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Lines of the file after a run."""
    given = {"count": 40, "batch": 16} | more
    generate(model, out, settings, start=(engine or FakeEngine()).start, **given)
    return [json.loads(line) for line in out.read_text().splitlines()]


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
    assert {(r.temperature, r.min_p) for r in users} == {(1.0, 0.02)}
    replies = [request for request in engine.asked if not is_user(request)]
    assert {(r.temperature, r.min_p) for r in replies} == {(0.0, 0.0), (0.8, 0.0)}
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


def test_no_turn_comes_again(chat_model: str, tmp_path: Path) -> None:
    """Not a first turn in its file, no turn twice in a conversation, none of other files at all."""

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
    with pytest.raises(ValueError, match=r"a\.jsonl: made with turns 3, not 2; resume it with"):
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


def test_a_students_loops_are_kept_and_taught_without_an_end(
    chat_model: str, tmp_path: Path
) -> None:
    def rule(request: Request) -> Completion:
        return answer("and so on " * 40, "repetition")

    asked = tmp_path / "asked.txt"
    asked.write_text("How far is it?\nAnd how long?\n")
    make_adapter(tmp_path / "adapter", Path(chat_model), drop_layers=[3, 5])
    given = {"prompts": asked, "count": None}
    assert made(chat_model, tmp_path / "base.jsonl", engine=FakeEngine(rule), **given) == []
    engine = FakeEngine(rule)
    given |= {"adapter": tmp_path / "adapter"}
    lines = made(chat_model, tmp_path / "ours.jsonl", engine=engine, **given)
    assert engine.adapter == tmp_path / "adapter" and len(lines) == 2
    assert all(line["messages"][-1]["cut"] for line in lines)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        made(chat_model, tmp_path / "ours.jsonl", engine=engine, **given)
    make_adapter(tmp_path / "adapter", Path(chat_model), drop_layers=[3])
    with pytest.raises(ValueError, match="made with adapter"):
        made(chat_model, tmp_path / "ours.jsonl", engine=engine, **given)
