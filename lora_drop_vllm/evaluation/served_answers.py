"""Tasks that a served model answers freely: the base model and LoRA-Drop on the same prompts.

One server answers for both, greedily: a request with k = 0 runs the base model, bit for bit. Such a
request makes every step of its batch full, so the two never run at the same time: the base model is
asked all questions first, then LoRA-Drop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from lora_drop_vllm.evaluation.significance import Comparison
from lora_drop_vllm.server_process import Endpoint

STOPS_ASKED = 4  # the API takes no more; the other strings are cut off here


@dataclass(frozen=True)
class Decoding:
    """How a server decodes GSM8K, HumanEval and rollouts.

    Attributes:
        url: URL of a running server; None starts one
        dtype: dtype of the server that is started, as for vLLM
        num_fewshot: worked examples before each GSM8K question
        max_tokens: tokens of an answer, at most
        concurrency: requests at a time. A step is full for all of them as soon as one has used up
            its k, or brings a prompt to a server with `prompts: now`
        temperature: of rollouts; 0 takes the most likely token, as all tasks do
        run_code: programs that the model writes for HumanEval may run on this machine
    """

    url: str | None = None
    dtype: str = "auto"
    num_fewshot: int = 5
    max_tokens: int = 512
    concurrency: int = 8
    temperature: float = 0.0
    run_code: bool = False


class Mark(NamedTuple):
    """Mark of one answer: right or not by each measure, and what was found in the answer."""

    right: dict[str, bool]
    found: str


@dataclass(frozen=True)
class DecodedTask:
    """A task whose questions are ready to be asked.

    Attributes:
        questions: names of the questions, one per prompt
        stop: strings that end an answer, the most frequent first
        mark: marks the answer to the question in a row
        skipped: lines of the file that could not be used
    """

    name: str
    questions: Sequence[str]
    prompts: Sequence[str]
    stop: Sequence[str]
    mark: Callable[[int, str], Mark]
    skipped: int


class Answer(NamedTuple):
    """An answer of the model; `refusal` is the server's reason if it refused the prompt."""

    text: str
    tokens: int
    cut_off: bool
    refusal: str = ""


@dataclass(frozen=True)
class Pass:
    """One pass over all questions.

    Attributes:
        tokens: tokens of all answers
        cut_off: answers that `max_tokens` ended
        full_steps, lora_steps: engine steps of each kind that the server ran meanwhile
    """

    tokens: int
    cut_off: int
    full_steps: int
    lora_steps: int

    @classmethod
    def of(
        cls, answers: Sequence[Any], before: Mapping[str, int], after: Mapping[str, int]
    ) -> Pass:
        """The pass that gave some answers, from the server's counts before and after it."""
        return cls(
            tokens=sum(answer.tokens for answer in answers),
            cut_off=sum(answer.cut_off for answer in answers),
            full_steps=after["full_steps"] - before["full_steps"],
            lora_steps=after["lora_steps"] - before["lora_steps"],
        )

    def line(self, who: str) -> str:
        """One line of a report."""
        return (
            f"  {who:<18}{self.full_steps} full and {self.lora_steps} LoRA steps, "
            f"{self.tokens} tokens, {self.cut_off} answers cut off"
        )


@dataclass(frozen=True)
class DecodedResult:
    """One task that a server decoded, with the base model and with LoRA-Drop.

    Attributes:
        task: name of its file
        examples: questions that both answered
        skipped: questions left out: unreadable, or refused by the server
        refusal: first reason that the server gave for a refusal
        base, lora_drop: tokens and steps of each
        measures: share of right answers by each measure
        answers: one entry per question, with both answers
    """

    task: str
    examples: int
    skipped: int
    refusal: str
    base: Pass
    lora_drop: Pass
    measures: dict[str, Comparison]
    answers: list[dict[str, Any]]


def run_decoded(server: Endpoint, task: DecodedTask, decoding: Decoding) -> DecodedResult:
    """Asks the base model, then LoRA-Drop, and marks the answers of both.

    Raises:
        ValueError: the server does not serve with LoRA-Drop, or refuses every question.
        RuntimeError: the server failed, or did not run the steps that are to be evaluated.
    """
    base, base_pass = _ask_all(server, task, decoding, {"lora_drop_k": 0}, "base")
    check_base_pass(task.name, base_pass, server.url)
    ours, our_pass = _ask_all(server, task, decoding, {}, "LoRA-Drop")
    check_lora_drop_pass(task.name, our_pass)
    refusals = [a.refusal or b.refusal for a, b in zip(ours, base)]
    rows = [row for row, refusal in enumerate(refusals) if not refusal]
    base_marks, our_marks = [], []
    for row in tqdm(rows, desc=f"{task.name} marks"):
        base_marks.append(task.mark(row, base[row].text))
        same = ours[row].text == base[row].text
        our_marks.append(base_marks[-1] if same else task.mark(row, ours[row].text))
    return DecodedResult(
        task=task.name,
        examples=len(rows),
        skipped=task.skipped + len(refusals) - len(rows),
        refusal=next(filter(None, refusals), ""),
        base=base_pass,
        lora_drop=our_pass,
        measures=_compare(our_marks, base_marks),
        answers=[
            {
                "question": task.questions[row],
                "base": {"text": base[row].text, **base_mark._asdict()},
                "lora_drop": {"text": ours[row].text, **our_mark._asdict()},
            }
            for row, base_mark, our_mark in zip(rows, base_marks, our_marks)
        ],
    )


def check_base_pass(name: str, taken: Pass, url: str) -> None:
    """Raises RuntimeError if somebody else's LoRA steps ran meanwhile."""
    if taken.lora_steps:
        raise RuntimeError(
            f"{name}: {taken.lora_steps} LoRA steps ran although all our requests had k = 0; "
            f"someone else uses {url}, which changes both results. Evaluate on a server that "
            "nobody else uses"
        )


def check_lora_drop_pass(name: str, taken: Pass) -> None:
    """Raises RuntimeError if no LoRA step ran."""
    if not taken.lora_steps:
        raise RuntimeError(
            f"{name}: no LoRA step ran in {taken.full_steps} steps, so there is nothing to "
            "compare. Serve with k of 1 or more and at least one drop layer; answers of a single "
            "token have no LoRA step either"
        )


def _compare(ours: Sequence[Mark], base: Sequence[Mark]) -> dict[str, Comparison]:
    return {
        measure: Comparison.of(
            [mark.right[measure] for mark in ours], [mark.right[measure] for mark in base]
        )
        for measure in ours[0].right
    }


def _ask_all(
    server: Endpoint, task: DecodedTask, decoding: Decoding, xargs: dict[str, int], who: str
) -> tuple[list[Answer], Pass]:
    """Answers in the order of the questions, and the steps that they took."""
    from openai import APIError, BadRequestError

    client = server.client()
    # plain greedy decoding: a model's generation config may set a penalty
    extra = {"repetition_penalty": 1.0} | ({"vllm_xargs": xargs} if xargs else {})

    def ask(prompt: str) -> Answer:
        try:
            said = client.completions.create(
                model=server.name,
                prompt=prompt,
                max_tokens=decoding.max_tokens,
                temperature=0,
                stop=list(task.stop[:STOPS_ASKED]),
                extra_body=extra,
            )
        except BadRequestError as error:
            return Answer("", 0, False, " ".join(error.message.split()))
        choice = said.choices[0]
        text = cut(choice.text, task.stop)
        cut_off = choice.finish_reason == "length" and text == choice.text
        return Answer(text, said.usage.completion_tokens, cut_off)

    before = steps(server)
    bar = {"total": len(task.prompts), "desc": f"{task.name} {who}"}
    try:
        with ThreadPoolExecutor(decoding.concurrency) as pool:
            answers = list(tqdm(pool.map(ask, task.prompts), **bar))
    except APIError as error:
        raise RuntimeError(f"{task.name}: {server.url} failed to answer ({error})") from error
    after = steps(server)
    if all(answer.refusal for answer in answers):
        raise ValueError(f"{task.name}: the server refuses every question: {answers[0].refusal}")
    return answers, Pass.of(answers, before, after)


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first string in it that ends it."""
    return min((text.partition(end)[0] for end in stop), key=len, default=text)


def steps(server: Endpoint) -> dict[str, int]:
    """The server's counts of its steps.

    Raises:
        ValueError: the server does not serve with LoRA-Drop.
        RuntimeError: it does not answer.
    """
    try:
        counters = server.metrics()
    except OSError as error:
        raise RuntimeError(f"{server.url}/metrics: cannot be read ({error})") from error
    if "lora_steps" not in counters:
        raise ValueError(
            f"{server.url}: serves without LoRA-Drop (no LoRA steps at /metrics); start the "
            "server with --model-impl lora_drop"
        )
    return counters
