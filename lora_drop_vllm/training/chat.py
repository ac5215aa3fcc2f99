"""Conversations to fit and train on: each reply of the assistant behind the prompt it had.

The tokenizer's chat template makes both, as a server does: the prompt ends where the reply begins,
so the schedule is the served one and the losses count what would have been generated.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

LEAST = 2  # tokens of a reply: the first is predicted by the prompt


@dataclass(frozen=True)
class Conversation:
    """Messages of a `role` and a `content`, at least one of them a reply of the assistant.

    A reply that was cut off says so in a field `cut`; it has no end to learn.
    """

    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, raw: Any) -> Conversation:
        """Out of the field `messages`.

        Raises:
            KeyError: it is something else.
        """
        if not isinstance(raw, list):
            raise KeyError("messages")
        for message in raw:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise KeyError("role")
            if not isinstance(message.get("content"), str):
                raise KeyError("content")
        found = cls(raw)
        if not list(found.replies()):
            raise KeyError("assistant")
        return found

    def replies(self) -> Iterator[int]:
        """Numbers of the messages that are replies: of the assistant, behind another message."""
        for number, message in enumerate(self.messages):
            if number and message["role"] == "assistant" and message["content"].strip():
                yield number


@dataclass(frozen=True)
class Reply:
    """Tokens of a prompt and a reply, and how many of them are the prompt's."""

    tokens: array[int]
    prompt: int


def render(
    documents: Sequence[str | Conversation], tokenizer: Any, length: int
) -> tuple[list[str | Reply], list[str]]:
    """The documents with replies in the place of conversations, and why other replies are none.

    Args:
        length: tokens at most; a longer reply loses its end

    Raises:
        ValueError: there are conversations and the tokenizer has no chat template.
    """
    chats = sum(isinstance(document, Conversation) for document in documents)
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "--corpus: messages need a chat template, and the model's tokenizer has none; take a "
            "chat model, or write each conversation as text in a field `text`"
        )
    found: list[str | Reply] = []
    reasons: list[str] = []
    with tqdm(total=chats, desc="Rendering", unit="conversation", disable=not chats) as progress:
        for document in documents:
            if isinstance(document, str):
                found.append(document)
                continue
            for number in document.replies():
                try:
                    found.append(_reply(document.messages[: number + 1], tokenizer, length))
                except ValueError as error:
                    reasons.append(str(error))
            progress.update()
    return found, reasons


def _reply(messages: list[dict[str, Any]], tokenizer: Any, length: int) -> Reply:
    """The last message behind those before it.

    Raises:
        ValueError: it cannot be used.
    """
    from jinja2 import TemplateError

    try:
        prompt, whole = (
            tokenizer.apply_chat_template(given, tokenize=False, **how)
            for given, how in (
                (messages[:-1], {"add_generation_prompt": True}),
                (messages, {"continue_final_message": bool(messages[-1].get("cut"))}),
            )
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a conversation ({error})") from error
    first, tokens = tokenizer([prompt, whole], add_special_tokens=False).input_ids
    if tokens[: len(first)] != first:
        raise ValueError("the chat template renders a reply otherwise than behind its prompt")
    if tokenizer.eos_token_id in tokens[len(first) :]:
        behind = tokens[::-1].index(tokenizer.eos_token_id)  # what a template puts there
        tokens = tokens[: len(tokens) - behind]
    tokens = tokens[:length]
    if len(tokens) - len(first) < LEAST:
        raise ValueError(
            f"a prompt of {len(first)} tokens leaves no room for a reply in --length {length}"
        )
    return Reply(array("i", tokens), len(first))
