"""HumanEval, decoded by a server: the model completes a function and the tests run it."""

from __future__ import annotations

from lora_drop_vllm.evaluation.sandbox import require_sandbox, run_program
from lora_drop_vllm.evaluation.served_answers import DecodedTask, Mark
from lora_drop_vllm.evaluation.tasks import Task

# the function ends before the first line that is not part of it
STOP = ("\ndef", "\nprint", "\nif", "\n#", "\nclass", "\n```")
MEASURE = "pass@1"


def human_eval(task: Task, run_code: bool) -> DecodedTask:
    """Programs of a task; each completion runs with the tests of the task.

    Raises:
        ValueError: `run_code` is False.
        RuntimeError: this machine cannot confine the programs.
    """
    if not run_code:
        raise ValueError(
            f"{task.name}: scoring it runs programs that the model writes on this machine, in a "
            "sandbox; add --run-code to allow that, or leave the task out"
        )
    require_sandbox()

    def mark(row: int, text: str) -> Mark:
        asked = task.examples[row]
        parts = [asked.prompt + text, asked.test, f"check({asked.entry_point})"]
        verdict = run_program(parts)
        return Mark({MEASURE: verdict.passed}, verdict.reason)

    return DecodedTask(
        name=task.name,
        questions=[program.name for program in task.examples],
        prompts=[program.prompt for program in task.examples],
        stop=STOP,
        mark=mark,
        skipped=task.skipped,
    )
