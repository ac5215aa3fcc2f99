"""Conversations to fit and train on: each assistant reply, after the prompt that it answers.

The tokenizer's chat template renders both, as on a server. The prompt ends where the reply begins.
The schedule is therefore the served one, and the losses count the generated tokens only. Plain
prompts and their completions are used likewise, without a template.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

LEAST = 2  # tokens of a reply, at least: the prompt predicts the first


@dataclass(frozen=True)
class Conversation:
    """Messages with a `role` and a `content`; at least one is an assistant reply.

    The field `cut` marks a reply that was cut off; it has no end to learn.
    """

    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, raw: Any) -> Conversation:
        """The conversation in a field `messages`.

        Raises:
            KeyError: the field holds no conversation.
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
        """Numbers of the assistant's messages that follow another message."""
        for number, message in enumerate(self.messages):
            if number and message["role"] == "assistant" and message["content"].strip():
                yield number


@dataclass(frozen=True)
class Completed:
    """A plain prompt and its completion; `cut` says that the completion has no end to learn.

    Attributes:
        stop: strings that end an answer to this prompt; rollouts use them
    """

    prompt: str
    completion: str
    cut: bool = False
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Completed:
        """The fields `prompt` and `completion`, and `cut` and `stop` if they are there.

        Raises:
            KeyError: they hold no prompt with a completion.
        """
        prompt, completion, stop = raw["prompt"], raw["completion"], raw.get("stop", [])
        if not all(isinstance(text, str) and text.strip() for text in (prompt, completion)):
            raise KeyError("completion")
        if not isinstance(stop, list) or not all(isinstance(end, str) and end for end in stop):
            raise KeyError("stop")
        return cls(prompt, completion, bool(raw.get("cut")), tuple(stop))


@dataclass(frozen=True)
class Reply:
    """Tokens of a prompt and a reply, and the number of prompt tokens."""

    tokens: array[int]
    prompt: int


def render(
    documents: Sequence[str | Conversation | Completed], tokenizer: Any, length: int
) -> tuple[list[str | Reply], list[str]]:
    """The documents, with each conversation replaced by its replies, and why others were left out.

    A completion becomes a reply to its prompt.

    Args:
        length: tokens at most; a longer reply loses its end

    Raises:
        ValueError: there are conversations, but the tokenizer has no chat template.
    """
    chats = sum(isinstance(document, Conversation) for document in documents)
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "--corpus: messages need a chat template, and the model's tokenizer has none; use a "
            "chat model, or write each conversation as text in a field `text`"
        )
    found: list[str | Reply] = []
    reasons: list[str] = []
    with tqdm(total=chats, desc="Rendering", unit="conversation", disable=not chats) as progress:
        for document in documents:
            if isinstance(document, str):
                found.append(document)
                continue
            if isinstance(document, Completed):
                _add(found, reasons, *_completion(document, tokenizer), length)
                continue
            for number in document.replies():
                try:
                    tokens, prompt = _reply(document.messages[: number + 1], tokenizer)
                except ValueError as error:
                    reasons.append(str(error))
                else:
                    _add(found, reasons, tokens, prompt, length)
            progress.update()
    return found, reasons


def _add(
    found: list[str | Reply], reasons: list[str], tokens: list[int], prompt: int, length: int
) -> None:
    """Adds a reply of up to `length` tokens, or the reason that there is none."""
    if min(len(tokens), length) - prompt < LEAST:
        reasons.append(
            f"a prompt of {prompt} tokens leaves no room for a reply in --length {length}"
        )
    else:
        found.append(Reply(array("i", tokens[:length]), prompt))


def _completion(document: Completed, tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of a prompt and its completion, and the number of prompt tokens, as on a server."""
    prompt = tokenizer(document.prompt).input_ids
    tokens = tokenizer(document.completion, add_special_tokens=False).input_ids
    ends = not document.cut and tokenizer.eos_token_id is not None
    end = [tokenizer.eos_token_id] if ends else []
    return prompt + tokens + end, len(prompt)


def _reply(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of messages, the last one a reply, and the number of tokens before it.

    Raises:
        ValueError: the reply cannot be used.
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
        raise ValueError("the chat template does not render a reply directly after its prompt")
    if tokenizer.eos_token_id in tokens[len(first) :]:
        behind = tokens[::-1].index(tokenizer.eos_token_id)  # the template's own tokens after it
        tokens = tokens[: len(tokens) - behind]
    return tokens, len(first)
