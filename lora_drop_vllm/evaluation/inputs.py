"""What an adapter is evaluated on, read and checked before a model is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_drop_vllm.atomic_files import check_file
from lora_drop_vllm.evaluation.gsm8k import gsm8k
from lora_drop_vllm.evaluation.human_eval import human_eval
from lora_drop_vllm.evaluation.served_answers import DecodedTask, Decoding
from lora_drop_vllm.evaluation.tasks import (
    Example,
    Task,
    WordProblem,
    read_task,
    read_text,
)
from lora_drop_vllm.generation.generate import read_prompts
from lora_drop_vllm.training.corpus import Corpus, read_corpus


@dataclass(frozen=True)
class Inputs:
    """All that is evaluated on.

    Attributes:
        text: name of the file of text, and what is in it
        chat: name of the file of conversations, and what is in it
        forced: tasks with given answers
        decoded: tasks that a server answers
        prompts: name of the file of chat prompts, and what is in it
    """

    text: tuple[str, str] | None
    chat: tuple[str, Corpus] | None
    forced: list[Task]
    decoded: list[DecodedTask]
    prompts: tuple[str, list[Any]] | None

    @classmethod
    def read(
        cls,
        text: str | Path | None,
        chat: str | Path | None,
        rollouts: str | Path | None,
        tasks: Sequence[Path],
        limit: int | None,
        decoding: Decoding,
    ) -> Inputs:
        """All from its files.

        Raises:
            ValueError: a file cannot be used; the error names the flag.
        """
        found = [read_task(path, limit, decoding.num_fewshot) for path in tasks]
        with chat_errors():
            conversations = (str(chat), read_corpus([chat])) if chat else None
        return cls(
            text=(str(text), read_text(Path(text))) if text else None,
            chat=conversations,
            forced=[task for task in found if task.form is Example],
            decoded=[_decoded(task, decoding) for task in found if task.form is not Example],
            prompts=_prompts(Path(rollouts), limit) if rollouts else None,
        )

    @property
    def here(self) -> bool:
        """True if something is scored in this process."""
        return bool(self.text or self.chat or self.forced)

    @property
    def served(self) -> bool:
        """True if something is decoded by a server."""
        return bool(self.decoded or self.prompts)


@contextmanager
def chat_errors() -> Iterator[None]:
    """Errors of a corpus inside name the flag that it came from here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--corpus", "--chat", 1)) from error


def _prompts(file: Path, limit: int | None) -> tuple[str, list[Any]]:
    return file.name, read_prompts(file, "--rollouts")[:limit]


def _decoded(task: Task, decoding: Decoding) -> DecodedTask:
    if task.form is WordProblem:
        return gsm8k(task, decoding.num_fewshot)
    return human_eval(task, decoding.run_code)


def check_asked(
    other: Any, rollouts: str | Path | None, temperature: float, out: str | Path | None
) -> None:
    """Raises ValueError unless there is something to evaluate on, and each setting has a use."""
    if not (other or rollouts):
        raise ValueError(
            "nothing to evaluate on: give --text FILE, --chat FILE, --rollouts or --tasks NAME"
        )
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: expected 0 (greedy) or more")
    if temperature and not rollouts:
        raise ValueError(
            f"--temperature {temperature}: tasks are decoded greedily; leave it out, or give "
            "--rollouts"
        )
    if out is not None:
        check_file("--json", Path(out))


def check_source(
    model: str | Path | None, adapter: str | Path | None, decoding: Decoding, inputs: Inputs
) -> None:
    """Raises ValueError unless it is clear who answers, and no setting is without use."""
    url = decoding.url
    if url and not inputs.served:
        raise ValueError(
            f"--url {url}: nothing is decoded by a server, as GSM8K, HumanEval and --rollouts "
            "are; leave --url out"
        )
    for field in fields(Decoding):
        value = getattr(decoding, field.name)
        if not inputs.served and value != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} {value}: nothing is decoded by a server, as "
                "GSM8K, HumanEval and --rollouts are; leave it out"
            )
    if url and not inputs.here:
        if model or adapter:
            raise ValueError("MODEL and --adapter: the server at --url has its own; leave both out")
    elif not (model and adapter):
        raise ValueError(
            "MODEL and --adapter DIR: missing; only what a server at --url decodes does without "
            "them"
        )
