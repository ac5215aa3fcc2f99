"""The places for turns in a chat template, and the check of sampled turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.engine.offline_generation import Completion

MARK = "lora-drop-was-here"  # marks a message's place in the rendered template
LEAST_CHARACTERS = 8  # characters of a user's turn, at least
LEAST_TOKENS = {"user": 3, "assistant": 4}
DISTINCT = 0.5  # share of distinct runs of four tokens, at least
LONG = 64  # tokens of a turn from which DISTINCT applies

Message = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """The end of a turn: token ids, or text if the template has no token for it."""

    tokens: tuple[int, ...]
    text: tuple[str, ...]


class Turns:
    """Prompts after which a model writes the user's or the assistant's turn.

    A turn's header is the template's text before a marked message; its ending is the text after the
    mark. This works for every template that leaves messages unchanged.

    Args:
        loops: accept replies that end in a loop

    Attributes:
        user: ending of a user's turn
        assistant: ending of a reply
        system: true if the template accepts system messages

    Raises:
        ValueError: the template leaves out a message.
    """

    def __init__(self, tokenizer: Any, loops: bool = False) -> None:
        self.tokenizer, self._loops = tokenizer, loops
        self._special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        } | set(tokenizer.all_special_ids)
        asked = {"role": "user", "content": "Hello"}
        self.user = self._ending(self._cut([], "user")[1])
        self.assistant = self._ending(self._cut([asked], "assistant")[1])
        self.system = self._takes_system()

    def user_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to and including the header of the user's next turn."""
        return self._tokens(self._cut(messages, "user")[0])

    def reply_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to and including the header of the reply, as a server renders them."""
        return self._tokens(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )

    def fault(self, turn: Completion, role: str) -> str | None:
        """The reason to leave a turn out, or None; a reply may be cut off, a user's turn not."""
        if loops(turn) and not (self._loops and role == "assistant"):
            return "repetition"
        if turn.end == "length" and role == "user":
            return "no end"
        text = turn.text.strip()
        short = role == "user" and len(text) < LEAST_CHARACTERS
        if short or not text or len(turn.tokens) < LEAST_TOKENS[role]:
            return "too short"
        if "\N{REPLACEMENT CHARACTER}" in text or self._special & set(turn.tokens):
            return "stray tokens"
        return None

    def _cut(self, messages: Sequence[Message], role: str) -> tuple[str, str]:
        """The template's text before and after a message."""
        given = [*messages, {"role": role, "content": MARK}]
        whole = self.tokenizer.apply_chat_template(given, tokenize=False)
        before, mark, behind = whole.rpartition(MARK)
        if not mark:
            raise ValueError(f"the chat template leaves out a message of role {role}")
        return before, behind

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _ending(self, behind: str) -> Ending:
        first = self._tokens(behind)[:1]
        if first and first[0] in self._special:
            return Ending((first[0],), ())
        return Ending((), (behind.strip(),) if behind.strip() else ())

    def _takes_system(self) -> bool:
        from jinja2 import TemplateError

        try:
            before, _ = self._cut([{"role": "system", "content": "Be brief."}], "user")
        except TemplateError:
            return False
        return "Be brief." in before


def loops(text: Completion) -> bool:
    """True for a text that ended in a loop, or whose runs of four tokens mostly repeat."""
    tokens = text.tokens
    runs = [tuple(tokens[n : n + 4]) for n in range(len(tokens) - 3)]
    few = len(tokens) >= LONG and len(set(runs)) < DISTINCT * len(runs)
    return few or text.end == "repetition"
