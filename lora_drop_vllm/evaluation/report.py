"""What `evaluate` found, as data, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lora_drop_vllm.evaluation.divergence import Divergence
from lora_drop_vllm.evaluation.rollout_report import RolloutsResult
from lora_drop_vllm.evaluation.scoring import TaskResult
from lora_drop_vllm.evaluation.served_answers import DecodedResult, Decoding
from lora_drop_vllm.evaluation.significance import Comparison, MeanLoss
from lora_drop_vllm.method.adapter import AdapterConfig

WINDOW, PROMPT = 256, 48  # tokens of a window of text, and of its prompt


@dataclass(frozen=True)
class TextResult:
    """Plain text under LoRA-Drop beside the base model.

    Attributes:
        file: as it was named
        windows: number of windows of 256 tokens that were measured
        steps: `all`, and `full` and `lora` if the schedule has such steps
    """

    file: str
    windows: int
    steps: dict[str, Divergence]

    def lines(self) -> list[str]:
        """A table with one row per kind of step."""
        return [
            f"{self.file}: {self.windows} windows of {WINDOW} tokens, prompt {PROMPT}",
            *_step_lines(self.steps),
        ]


def _step_lines(steps: dict[str, Divergence]) -> list[str]:
    return [
        f"{'steps':<8}{'tokens':>9}{'perplexity':>12}{'base':>9}{'KL':>8}{'agreement':>11}",
        *(
            f"{kind:<8}{d.tokens:>9}{d.perplexity:>12.2f}{d.base_perplexity:>9.2f}"
            f"{d.kl:>8.3f}{d.agreement:>11.3f}"
            for kind, d in steps.items()
        ),
    ]


@dataclass(frozen=True)
class ChatResult:
    """Chat replies under LoRA-Drop beside the base model.

    Attributes:
        file: as it was named
        replies: number of replies that were measured
        steps: `all`, and `full` and `lora` if the schedule has such steps
    """

    file: str
    replies: int
    steps: dict[str, Divergence]

    def lines(self) -> list[str]:
        """A table with one row per kind of step."""
        return [f"{self.file}: {self.replies} replies", *_step_lines(self.steps)]


@dataclass(frozen=True)
class ServedDecoding(Decoding):
    """How a server was asked, and what it calls its model."""

    served: str = ""


@dataclass(frozen=True)
class EvaluateResult:
    """Quality under the served schedule beside the base model's; `str` of it is a table.

    Attributes:
        model: as it was named; None if a running server brought its own
        tasks: tasks with given answers, in the order in which they were named
        decoded: tasks that a server answered, likewise
        adapter: contents of its `adapter_config.json`; None if the server brought its own
        decoding: how the server was asked; None if none was
        text: perplexity, KL and agreement on plain text, if asked for
        chat: the same on chat replies
        rollouts: answers to chat prompts, in numbers
        mean_loss: mean loss of accuracy over `tasks`, if there are two or more
    """

    model: str | None
    tasks: list[TaskResult] = field(default_factory=list)
    decoded: list[DecodedResult] = field(default_factory=list)
    adapter: AdapterConfig | None = None
    decoding: ServedDecoding | None = None
    text: TextResult | None = None
    chat: ChatResult | None = None
    rollouts: RolloutsResult | None = None
    mean_loss: MeanLoss | None = None

    def __str__(self) -> str:
        lines = self.text.lines() if self.text else []
        lines += self.chat.lines() if self.chat else []
        for task in self.tasks:
            lines += _task_lines(task)
        if mean := self.mean_loss:
            lines.append(
                f"mean of {mean.tasks} tasks: {100 * mean.loss:.1f} points of accuracy lost, "
                f"95 % interval {100 * mean.low:.1f} to {100 * mean.high:.1f}"
            )
        for answered in self.decoded:
            lines += _decoded_lines(answered)
        lines += self.rollouts.lines() if self.rollouts else []
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The JSON object that `lora-drop evaluate --json` writes: only what was asked for."""
        always = ("model", "tasks", "decoded")
        return {
            name: value
            for name, value in asdict(self).items()
            if name in always or value is not None
        }


def _task_lines(task: TaskResult) -> list[str]:
    lines = [
        f"{task.task}: {task.examples} questions, {task.skipped} skipped, "
        f"{task.lora_share:.0%} of the scored tokens predicted by LoRA steps, KL {task.kl:.3f}",
        _measure("accuracy", task.accuracy),
    ]
    if task.accuracy_per_byte:
        lines.append(_measure("accuracy_per_byte", task.accuracy_per_byte))
    return lines


def _decoded_lines(task: DecodedResult) -> list[str]:
    refusal = f" ({task.refusal})" if task.refusal else ""
    lines = [f"{task.task}: {task.examples} questions, {task.skipped} skipped{refusal}"]
    lines += [task.base.line("base"), task.lora_drop.line("LoRA-Drop")]
    return lines + [_measure(name, found) for name, found in task.measures.items()]


def _measure(name: str, c: Comparison) -> str:
    return (
        f"  {name:<18}{c.share:.3f} ± {c.share_se:.3f}, base {c.base:.3f} ± {c.base_se:.3f}, "
        f"p = {c.p_value:.2g}"
    )
