"""Turns: their place in a template, the faults of sampled ones, and prompts from files."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_models import make_chat_tokenizer
from fake_generator import answer

from lora_drop_vllm.engine.offline_generation import Completion
from lora_drop_vllm.generation.generate import read_prompts
from lora_drop_vllm.generation.turns import Turns

FAMILIES = {
    "smollm2": (
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "line 1 has neither a `prompt` nor"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1 has neither"),
        ("[]", "line 1 has neither"),
        ('{"prompt": "a"}\n{', r"cannot be used \(line 2 is no JSON"),
        ('{"prompt": "\\ud83d"}', "line 1 is no valid Unicode"),
        ('{"messages": [{"role": "user"}]}', "line 1 has `messages` that are no list"),
        ("", "empty; name a file"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")
