"""A fake server that answers chat prompts and scores what was answered, without a model."""

from __future__ import annotations

import math
from typing import Any

from fake_server import FakeServer, Handler

END = "<end>"
MAX_LEN = 64
# probability and rank of a token that the base model would have chosen, and of any other
LIKED, OTHER = (0.5, 1), (0.01, 9)


class ChatFake(FakeServer):
    """`say` gives the text of an answer; its words are the tokens, and the prompt has one a word.

    Attributes:
        words: the vocabulary, by token id
        liked: words that the base model would always have chosen itself
    """

    def __init__(self, say: Any, liked: set[str]) -> None:
        super().__init__(say)
        self.RequestHandlerClass = ChatHandler
        self.words = [END]
        self.liked = liked | {END}

    def ids(self, text: str) -> list[int]:
        """Tokens of a text; new words join the vocabulary."""
        with self.lock:
            self.words += [w for w in dict.fromkeys(text.split()) if w not in self.words]
            return [self.words.index(word) for word in text.split()]

    def answer(self, body: dict[str, Any], base: bool) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            return self.scored(body)
        asked = body["messages"][-1]["content"]
        text = self.say(asked, base)
        ids = [*self.ids(text), 0]
        reason = "length" if len(ids) > body["max_tokens"] else "stop"
        ids = ids[: body["max_tokens"]]
        self.count(base, len(ids))
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason, "token_ids": ids}
        return self.head("chat.completion", choice) | {"prompt_token_ids": self.ids(asked)}

    def scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of the tokens of a prompt, each beside those of a better one."""
        entries: list[Any] = [None]
        for token in body["prompt"][1:]:
            found = {"-1": (0.6, 1), str(token): OTHER}
            if self.words[token] in self.liked:
                found = {str(token): LIKED}
            entries.append(
                {
                    name: {"logprob": math.log(p), "rank": rank, "decoded_token": name}
                    for name, (p, rank) in found.items()
                }
            )
        self.count(True, 1)
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": entries}
        return self.head("text_completion", choice)


class ChatHandler(Handler):
    server: ChatFake

    def models(self) -> dict[str, Any]:
        return super().models() | {"max_model_len": MAX_LEN}
