"""Conversations that a model writes in batches: user turns, and the replies to them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.engine.offline_generation import Generator, Request
from lora_drop_vllm.generation.generated_file import key, normalized
from lora_drop_vllm.generation.turns import Message, Turns

USER_TOKENS = 128  # tokens of a user's turn, at most
USER_MIN_P = 0.02  # for a user's turn at temperature 1; top-p would sort the vocabulary
USER_TURNS = {"user_tokens": USER_TOKENS, "user_min_p": USER_MIN_P}  # decide the text, too
SPARE = 512  # tokens of a context for headers and a system prompt
REPEATED = "repeated turn"
LEAST = 16  # tokens that --max-tokens must allow, and of a continuation, at least
SYSTEMS = (
    "",
    "You are a helpful assistant.",
    "You are a concise assistant. Answer in one or two sentences.",
    "You are a patient teacher. Explain step by step, in simple words.",
    "You are an experienced programmer. Answer with code where it helps.",
    "You are a creative writer with a vivid style.",
)


@dataclass(frozen=True)
class Generation:
    """The settings that decide the text.

    Attributes:
        max_tokens: tokens of a reply or a continuation, at most
        turns: turns of a conversation, at most; fewer are likelier
        greedy: share of the documents that are greedy
        temperature: temperature of the other replies
        system: system prompts for half of the conversations; the others have none
    """

    seed: int = 0
    max_tokens: int = 512
    turns: int = 3
    greedy: float = 0.5
    temperature: float = 0.8
    system: tuple[str, ...] = SYSTEMS

    def check(self) -> None:
        """Raises ValueError for a value out of range; the error names the flag."""
        for ok, flag, value, allowed in (
            (self.max_tokens >= LEAST, "max-tokens", self.max_tokens, f"{LEAST} or more"),
            (self.turns >= 1, "turns", self.turns, "1 or more"),
            (0 <= self.greedy <= 1, "greedy", self.greedy, "0 to 1; write 0.5 for half"),
            (self.temperature > 0, "temperature", self.temperature, "more than 0; see --greedy"),
        ):
            if not ok:
                raise ValueError(f"--{flag} {value}: expected {allowed}")

    def random(self, *what: Any) -> random.Random:
        """A random generator for one purpose, the same in every run."""
        return random.Random("/".join(map(str, (self.seed, *what))))

    def request(self, tokens: list[int], greedy: bool, *what: Any, **stop: Any) -> Request:
        """A request for a reply or a continuation."""
        temperature = 0.0 if greedy else self.temperature
        seed = self.random(*what).getrandbits(31)
        return Request(tokens, self.max_tokens, seed, temperature, **stop)


@dataclass(frozen=True)
class Run:
    """What the batches of a run share.

    Attributes:
        context: tokens of a prompt and its continuation
        known: keys of earlier documents, which must not repeat
        excluded: user turns that must not occur at all
        say: receives the name of the turn in progress
    """

    engine: Generator
    context: int
    known: set[str]
    excluded: set[str]
    say: Callable[[str], Any]


@dataclass
class Talk:
    """A conversation in progress."""

    number: int
    messages: list[Message]
    turns: int
    greedy: bool
    tokens: int = 0
    open: bool = True


class Conversations:
    """Conversations by attempt: sampled or given user turns, and the replies to them.

    Args:
        asked: conversations to answer, by attempt; None samples the user's turns
        student: the engine serves an adapter, whose loops are kept: training can cure them

    Attributes:
        context: tokens of the longest conversation, at most
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: Generation,
        asked: Mapping[int, list[Message]] | None,
        student: bool = False,
    ) -> None:
        self._turns, self._settings = Turns(tokenizer, loops=student), settings
        self._asked = asked
        self.context = settings.turns * (USER_TOKENS + settings.max_tokens) + SPARE
        for messages in (asked or {}).values():
            needed = len(self._turns.reply_prompt(messages)) + settings.max_tokens
            self.context = max(self.context, needed)

    def write(
        self,
        numbers: Sequence[int],
        run: Run,
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Records of the usable attempts, and the numbers of turns left out, by reason."""
        talks = [self._begin(number) for number in numbers]
        left_out: Counter[str] = Counter()
        for turn in range(max(talk.turns for talk in talks)):
            for role in ("user", "assistant"):
                run.say(f"turn {turn + 1}, {role}")
                going = [
                    talk
                    for talk in talks
                    if talk.open
                    and turn < talk.turns
                    and (role == "assistant" or not _waits_for_reply(talk.messages))
                ]
                self._add_turns(going, role, run.engine, run.context, left_out)
                if role == "user" and self._asked is None:
                    _end_repetitions(going, run.known, run.excluded, left_out)
        records = [_record(talk) for talk in talks if talk.tokens]
        if self._asked is None:  # in this batch, repetitions are told only now
            records = distinct(records, run.known, left_out)
        return records, left_out

    def _begin(self, number: int) -> Talk:
        chance = self._settings.random(number)
        greedy = chance.random() < self._settings.greedy
        if self._asked is not None:
            return Talk(number, list(self._asked[number]), 1, greedy)
        lengths = range(1, self._settings.turns + 1)
        turns = chance.choices(lengths, [1 / length for length in lengths])[0]
        system = chance.choice(self._settings.system) if self._settings.system else None
        given = system is not None and self._turns.system and chance.random() < 0.5
        return Talk(number, [{"role": "system", "content": system}] if given else [], turns, greedy)

    def _add_turns(
        self,
        talks: Sequence[Talk],
        role: str,
        engine: Generator,
        context: int,
        left_out: Counter[str],
    ) -> None:
        """Adds the next turn to each conversation, or ends it."""
        requests, asked = [], []
        for talk in talks:
            request = self._request(talk, role)
            if len(request.tokens) + request.max_tokens > context:
                talk.open = False
                left_out["too long"] += 1
            else:
                requests.append(request)
                asked.append(talk)
        for talk, answer in zip(asked, engine(requests) if requests else ()):
            if fault := self._turns.fault(answer, role):
                talk.open = False
                left_out[fault] += 1
                continue
            talk.messages.append({"role": role, "content": answer.text.strip()})
            if role == "assistant":
                talk.tokens += len(answer.tokens)
                if answer.end != "stop":
                    talk.messages[-1]["cut"] = True
                    talk.open = False

    def _request(self, talk: Talk, role: str) -> Request:
        what = (talk.number, len(talk.messages), role)
        if role == "assistant":
            ending = self._turns.assistant
            return self._settings.request(
                self._turns.reply_prompt(talk.messages),
                talk.greedy,
                *what,
                stop=ending.tokens,
                stop_text=ending.text,
            )
        seed = self._settings.random(*what).getrandbits(31)
        prompt, ending = self._turns.user_prompt(talk.messages), self._turns.user
        return Request(prompt, USER_TOKENS, seed, 1.0, USER_MIN_P, ending.tokens, ending.text)


def _waits_for_reply(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[-1]["role"] == "user"


def _end_repetitions(
    talks: Sequence[Talk], known: set[str], excluded: set[str], left_out: Counter[str]
) -> None:
    """Ends conversations whose last turn repeats an earlier one."""
    for talk in talks:
        if not talk.open:
            continue
        turns = [normalized(m["content"]) for m in talk.messages if m["role"] == "user"]
        if turns[-1] in excluded or turns[-1] in (turns[:-1] or known):
            talk.open = False
            left_out[REPEATED] += 1


def distinct(
    records: Sequence[dict[str, Any]], known: set[str], left_out: Counter[str]
) -> list[dict[str, Any]]:
    """Records that repeat neither an earlier batch nor each other."""
    seen, found = set(known), []
    for record in records:
        if key(record) in seen:
            left_out[REPEATED] += 1
        else:
            seen.add(key(record))
            found.append(record)
    return found


def _record(talk: Talk) -> dict[str, Any]:
    messages = talk.messages
    if _waits_for_reply(messages):
        messages = messages[:-1]  # its reply could not be used
    made = {"number": talk.number, "greedy": talk.greedy, "tokens": talk.tokens}
    return {"messages": messages} | made
