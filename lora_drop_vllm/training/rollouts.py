"""`lora-drop train --rollouts`: the student learns from its own answers (GKD, arXiv 2306.13649).

Every so many steps the engine serves the adapter of that step, and it answers prompts of the
corpus. Rows of these answers are mixed into the corpus; their targets are the base model's
distributions, as everywhere. The student then learns at the states that it reaches by itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_drop_vllm.method.adapter import AdapterConfig, save_adapter
from lora_drop_vllm.training.chat import Completed, Conversation
from lora_drop_vllm.training.corpus import Corpus, mixture, read_corpus
from lora_drop_vllm.training.gradient import Plan
from lora_drop_vllm.training.mixture import MixedPosition, MixedRows
from lora_drop_vllm.training.rows import Position
from lora_drop_vllm.training.settings import Settings

FOLDER = "rollouts"  # in the run's folder: a file of answers per round
OPENING = 2000  # characters of a text to continue; `generate` takes its first tokens


def forget_rollouts(out: Path) -> None:
    """Deletes the answers of an earlier run, which no checkpoint vouches for."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


class Rollouts:
    """The rows of a run that trains on its own answers.

    Args:
        model: folder, or a name in the local Hugging Face cache
        corpus: the corpus with its conversations and completions, which give the prompts; a model
            without a chat template continues its texts
        out: the run's folder

    Raises:
        ValueError: the corpus has no prompts, or several processes train together.
    """

    def __init__(
        self, model: str, tokenizer: Any, corpus: Corpus, settings: Settings, plan: Plan, out: Path
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"--rollouts {plan.rollouts}: needs a run in one process")
        chat = bool(getattr(tokenizer, "chat_template", None))
        self._prompts = list(_prompts(corpus.documents, chat))
        if not self._prompts:
            raise ValueError(
                f"--rollouts {plan.rollouts}: the corpus has no conversations to take prompts "
                "from; add one, such as self, or leave --rollouts out"
            )
        self._model, self._tokenizer = model, tokenizer
        self._corpus = corpus.rendered(tokenizer, settings.length)
        self._settings, self._plan, self._out = settings, plan, out

    def due(self, step: int) -> bool:
        """True if a round of answers begins at this step."""
        return step % self._plan.rollouts == 0

    def rows(
        self, step: int, position: Any, config: AdapterConfig, tensors: dict[str, Tensor]
    ) -> MixedRows:
        """Rows from this step on; the adapter answers first if a round begins.

        Args:
            position: of the next row; when a round begins, its answers are read from the start
            config, tensors: the adapter at this step

        Raises:
            RuntimeError: the answers could not be written.
        """
        plan, settings = self._plan, self._settings
        answers = self._out / FOLDER / f"{step - step % plan.rollouts}.jsonl"
        if not answers.exists():
            self._answer(step, answers, config, tensors)
        said = read_corpus([answers]).rendered(self._tokenizer, settings.length)
        parts = self._corpus.parts or ((1.0, self._corpus),)
        whole = sum(share for share, _ in parts)
        corpora = [(share / whole * (1 - plan.on_policy), corpus) for share, corpus in parts]
        if self.due(step) and isinstance(position, MixedPosition):
            position = MixedPosition((*position.parts[:-1], Position()), position.given)
        mixed = mixture([*corpora, (plan.on_policy, said)])
        like = mixed, self._tokenizer, settings.length, settings.seed, position
        return MixedRows(*like, own=True)

    def _answer(
        self, step: int, answers: Path, config: AdapterConfig, tensors: dict[str, Tensor]
    ) -> None:
        """Writes a round's answers; an engine in a process of its own leaves no memory here."""
        folder = answers.parent / "new"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        save_adapter(folder / "adapter", config, tensors)
        chance = random.Random(f"{self._settings.seed}/{step}")
        count = min(self._plan.rollout_prompts, len(self._prompts))
        asked = [json.dumps(prompt) for prompt in chance.sample(self._prompts, count)]
        (folder / "prompts.jsonl").write_text("\n".join(asked) + "\n")
        command = [sys.executable, "-m", "lora_drop_vllm.cli", "generate", self._model]
        command += ["--adapter", str(folder / "adapter"), "--out", str(folder / answers.name)]
        command += ["--prompts", str(folder / "prompts.jsonl"), "--batch", str(count)]
        command += ["--greedy", str(self._plan.rollout_greedy)]
        command += ["--max-tokens", str(self._settings.length)]
        command += ["--seed", str(chance.getrandbits(31))]
        if subprocess.run(command, stdout=2).returncode:  # 2: sys.stderr may be no file
            raise RuntimeError(
                f"--rollouts: `{' '.join(command[1:])}` failed, see above; run the same training "
                "command again to resume"
            )
        (folder / answers.name).replace(answers)
        shutil.rmtree(folder)


def _prompts(documents: Sequence[Any], chat: bool) -> Iterator[dict[str, Any]]:
    """Prompts as lines for `lora-drop generate --prompts`."""
    for document in documents:
        if chat and isinstance(document, Conversation):
            for number in document.replies():
                if document.messages[number - 1]["role"] == "user":
                    yield {"messages": document.messages[:number]}
        elif isinstance(document, Completed):
            yield {"text": document.prompt, "stop": document.stop}
        elif not chat and isinstance(document, str):
            yield {"prompt": document[:OPENING]}
