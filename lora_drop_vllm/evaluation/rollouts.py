"""Rollouts: answers of a served model to chat prompts, from the base model and from LoRA-Drop.

One server gives both: first all answers of the base model (k = 0), then all of LoRA-Drop, because
a request with k = 0 makes every step of its batch full. At last the base model scores what each
wrote, from one full step per answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from lora_drop_vllm.evaluation.rollout_report import (
    Rollout,
    RolloutsResult,
    figures,
    same_start,
)
from lora_drop_vllm.evaluation.served_answers import (
    Decoding,
    Pass,
    check_base_pass,
    check_lora_drop_pass,
    steps,
)
from lora_drop_vllm.evaluation.significance import mean
from lora_drop_vllm.opinions import score
from lora_drop_vllm.server_process import Endpoint

CHAT_PROMPTS = Path(str(files("lora_drop_vllm.evaluation"))) / "chat_prompts.txt"
# plain sampling: a model's generation config may set other values
PLAIN = {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0}

Item, Found = TypeVar("Item"), TypeVar("Found")
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """An answer as the server gave it; `refusal` is the reason if it gave none."""

    text: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    cut_off: bool
    refusal: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.ids)


def run_rollouts(
    server: Endpoint, name: str, prompts: Sequence[Messages], decoding: Decoding
) -> RolloutsResult:
    """Asks the base model, then LoRA-Drop, and has the base model score the answers of both.

    Args:
        name: of the file of prompts, for the report
        prompts: conversations that wait for a reply

    Raises:
        ValueError: the server does not serve with LoRA-Drop, or refuses every prompt.
        RuntimeError: the server failed, or did not run the steps that are to be evaluated.
    """
    from openai import APIError

    try:
        return asyncio.run(_Asking(server, name, decoding).both(prompts))
    except APIError as error:
        raise RuntimeError(f"{name}: {server.url} failed to answer ({error})") from error


class _Asking:
    """One run; its client lives as long as its event loop."""

    def __init__(self, server: Endpoint, name: str, decoding: Decoding) -> None:
        self.server, self.name, self.decoding = server, name, decoding
        self.max_len = server.max_len()
        self.client = server.async_client()

    async def both(self, prompts: Sequence[Messages]) -> RolloutsResult:
        async with self.client:
            base, base_pass = await self._answers(prompts, {"lora_drop_k": 0}, "base")
            check_base_pass(self.name, base_pass, self.server.url)
            ours, our_pass = await self._answers(prompts, {}, "LoRA-Drop")
            check_lora_drop_pass(self.name, our_pass)
            refusals = [a.refusal or b.refusal for a, b in zip(ours, base)]
            rows = [row for row, refusal in enumerate(refusals) if not refusal]
            answers = [base[row] for row in rows] + [ours[row] for row in rows]
            scored = await self._each(self._score, answers, "scores")
        base_rollouts, our_rollouts = scored[: len(rows)], scored[len(rows) :]
        return RolloutsResult(
            prompts=self.name,
            examples=len(rows),
            skipped=len(prompts) - len(rows),
            refusal=next(filter(None, refusals), ""),
            base=base_pass,
            lora_drop=our_pass,
            figures=figures(our_rollouts, base_rollouts),
            same_start=mean([same_start(ours[row].ids, base[row].ids) for row in rows]),
            answers=[
                {"messages": prompts[row], "base": asdict(b), "lora_drop": asdict(a)}
                for row, a, b in zip(rows, our_rollouts, base_rollouts)
            ],
        )

    async def _answers(
        self, prompts: Sequence[Messages], xargs: dict[str, int], who: str
    ) -> tuple[list[Written], Pass]:
        """Answers in the order of the prompts, and the steps that they took."""
        extra = PLAIN | {"return_token_ids": True} | ({"vllm_xargs": xargs} if xargs else {})
        before = steps(self.server)
        answers = await self._each(lambda messages: self._ask(messages, extra), prompts, who)
        after = steps(self.server)
        if all(answer.refusal for answer in answers):
            raise ValueError(f"{self.name}: the server refuses every prompt: {answers[0].refusal}")
        return answers, Pass.of(answers, before, after)

    async def _ask(self, messages: Messages, extra: dict[str, Any]) -> Written:
        from openai import BadRequestError

        try:
            said = await self.client.chat.completions.create(
                model=self.server.name,
                messages=list(messages),
                max_tokens=self.decoding.max_tokens,
                temperature=self.decoding.temperature,
                top_p=1,
                extra_body=extra,
            )
        except BadRequestError as error:
            return Written("", (), (), False, " ".join(error.message.split()))
        choice, prompt_ids = said.choices[0], said.model_extra["prompt_token_ids"]
        if len(prompt_ids) > self.max_len - 2:
            return Written("", (), (), False, "no room for an answer that can be scored")
        ids = choice.model_extra["token_ids"]
        cut_off = choice.finish_reason == "length"
        return Written(choice.message.content or "", prompt_ids, ids, cut_off)

    async def _score(self, answer: Written) -> Rollout:
        scores = await score(
            self.client, self.server.name, answer.prompt_ids, answer.ids, self.max_len
        )
        return Rollout.of(answer.text, answer.ids, answer.cut_off, scores)

    async def _each(
        self, ask: Callable[[Item], Awaitable[Found]], items: Sequence[Item], who: str
    ) -> list[Found]:
        """What `ask` finds for each item, in their order, some at a time."""
        gate = asyncio.Semaphore(self.decoding.concurrency)

        with tqdm(total=len(items), desc=f"{self.name} {who}") as progress:

            async def one(item: Item) -> Found:
                async with gate:
                    found = await ask(item)
                progress.update()
                return found

            return await asyncio.gather(*(one(item) for item in items))
