"""GSM8K and HumanEval: files, prompts, marks, and the command with a fake server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer

from lora_drop_vllm.cli import main
from lora_drop_vllm.evaluation import evaluate as evaluation
from lora_drop_vllm.evaluation.gsm8k import FLEXIBLE, STRICT, gsm8k
from lora_drop_vllm.evaluation.human_eval import human_eval
from lora_drop_vllm.evaluation.served_answers import cut
from lora_drop_vllm.evaluation.tasks import Program, WordProblem, number, read_task
from lora_drop_vllm.server_process import Endpoint

SUMS = [
    {"question": f"What is {n} and {n}?", "answer": f"Add <<{n}+{n}={2 * n}>>them.\n#### {2 * n}"}
    for n in range(1, 6)
]
HALF = {
    "task_id": "Half/0",
    "prompt": 'def half(n):\n    """Half of an even number."""\n',
    "entry_point": "half",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}


@pytest.fixture
def fake() -> Iterator[Callable[[Callable[[str, bool], str]], FakeServer]]:
    """Starts a server; a function of the prompt and of k = 0 gives its answers."""
    running: list[FakeServer] = []

    def start(say: Callable[[str, bool], str]) -> FakeServer:
        running.append(FakeServer(say))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with both tasks."""
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SUMS))
    (tmp_path / "human_eval.jsonl").write_text(json.dumps(HALF) + "\n")
    return tmp_path


def solve(prompt: str, base: bool) -> str:
    """The base model is right; LoRA-Drop forgets the mark of sums and halves wrongly."""
    if prompt.startswith("def half"):
        return "    return n // 2\n\nclass More:\n    1 / 0\n" if base else "    return n\n"
    total = 2 * int(prompt.split("What is ")[-1].split()[0])
    return f" So it is\n#### {total}\n\nQuestion: 9?" if base else f" That makes ${total}.00."


def test_both_published_forms_are_read(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    parts = {"context": "What is 1?", "chain_of_thought": "Itself.", "answer": "1,001"}
    path.write_text("\n".join(map(json.dumps, [parts, *SUMS, HALF, {**SUMS[0], "answer": "2"}])))
    task = read_task(path)
    assert task.form is WordProblem and (len(task.examples), task.skipped) == (7, 1)
    assert task.examples[0] == WordProblem("What is 1?", "Itself.", Decimal(1001))
    assert task.examples[1].reasoning == "Add <<1+1=2>>them." and task.examples[1].answer == 2
    assert len(read_task(path, limit=2, shots=3).examples) == 5
    path.write_text(json.dumps(HALF | {"language": "python"}))
    assert read_task(path, limit=1, shots=3).examples == [
        Program("Half/0", HALF["prompt"], "half", HALF["test"])
    ]
    path.write_text(json.dumps({**SUMS[0], "answer": "many"}))
    with pytest.raises(ValueError, match="answer='many': expected a number; after reasoning"):
        read_task(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("18", 18), (" $1,234.50. ", Decimal("1234.5")), ("-3", -3), ("18.00", 18), ("", None),
     ("1.2.3", None), ("nan", None), ("-$5", -5)],
)  # fmt: skip
def test_numbers_are_read_as_written(text: str, value: Any) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so #### 6", True, True),
        ("so ####6 apples", True, True),
        ("so #### $6.00.\n#### 7", True, False),
        ("5 + 1 = 6", False, True),
        ("it is $6.", False, True),
        ("#### six", False, False),
        ("6 of 7", False, False),
        ("#### -6", False, False),
        ("#### 6,000", False, False),
        ("", False, False),
    ],
)
def test_sums_are_marked_by_both_measures(
    data: Path, text: str, strict: bool, flexible: bool
) -> None:
    task = gsm8k(read_task(data / "gsm8k.jsonl"), shots=2)
    assert task.mark(0, text).right == {STRICT: strict, FLEXIBLE: flexible}


def test_an_answer_ends_at_the_first_of_its_ends() -> None:
    assert cut("a\nclass b\ndef c", ("\ndef", "\nclass")) == "a"
    assert cut("a", ("\ndef",)) == cut("a", ()) == "a"


def test_worked_examples_come_from_the_file_and_are_not_asked(data: Path) -> None:
    task = gsm8k(read_task(data / "gsm8k.jsonl"), shots=2)
    assert task.questions == ["2", "3", "4"]
    assert task.prompts[0] == (
        "Question: What is 1 and 1?\nAnswer: Add <<1+1=2>>them.\n#### 2\n\n"
        "Question: What is 2 and 2?\nAnswer: Add <<2+2=4>>them.\n#### 4\n\n"
        "Question: What is 3 and 3?\nAnswer:"
    )
    assert gsm8k(read_task(data / "gsm8k.jsonl"), 0).prompts[0].count("Question") == 1
    with pytest.raises(ValueError, match="--num-fewshot 5: gsm8k has 5 questions, so none"):
        gsm8k(read_task(data / "gsm8k.jsonl"), 5)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return n // 2\n", True),
        ("    return n\n", False),
        ("    return n // 2\nraise SystemExit(0)\n", False),
        ("    return n\nimport os\nos._exit(0)\n", False),
        ("    return n\n'''", False),
        ("    return n\ndef check(candidate): pass\n", False),
        ("    return n\nimport builtins\nbuiltins.compile = builtins.exec = print\n", False),
    ],
)
def test_only_a_right_function_is_marked_right(data: Path, completion: str, right: bool) -> None:
    task = human_eval(read_task(data / "human_eval.jsonl"), run_code=True)
    assert task.mark(0, completion).right == {"pass@1": right}


def test_the_command_asks_the_base_model_then_lora_drop(
    data: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = threading.Barrier(2)  # two requests at a time

    def say(prompt: str, base: bool) -> str:
        if prompt.startswith("Question"):
            pair.wait(timeout=60)
        return solve(prompt, base)

    server = fake(say)
    command = ["evaluate", "--url", f"{server.url}/v1/", "--tasks", "gsm8k,human_eval"]
    command += ["--data", str(data), "--num-fewshot", "2", "--run-code", "--limit", "2"]
    assert main([*command, "--concurrency", "2", "--json", str(data / "out.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((data / "out.json").read_text())
    sums, half = report["decoded"]
    assert (sums["examples"], half["examples"]) == (2, 1)
    assert sums["measures"][STRICT]["base"] == 1 and sums["measures"][STRICT]["share"] == 0
    assert sums["measures"][FLEXIBLE]["base"] == sums["measures"][FLEXIBLE]["share"] == 1
    assert half["measures"]["pass@1"]["only_base"] == 1 and "AssertionError" in str(half["answers"])
    for result in (sums, half):
        assert result["base"]["lora_steps"] == 0 < result["lora_drop"]["lora_steps"]
        assert result["base"]["full_steps"] == result["base"]["tokens"]
    assert half["answers"][0]["base"]["text"] == "    return n // 2\n"
    assert "gsm8k: 2 questions, 0 skipped" in printed and "full and 0 LoRA steps" in printed
    assert "pass@1            0.000 ± 0.000, base 1.000" in printed
    assert not server.overlapped
    assert [body.get("vllm_xargs") is not None for body in server.asked] == [
        *(True, True, False, False),
        *(True, False),
    ]
    assert {body["temperature"] for body in server.asked} == {0}
    assert {body["repetition_penalty"] for body in server.asked} == {1}


def test_questions_that_the_server_refuses_are_left_out_for_both(
    data: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(prompt: str, base: bool) -> str:
        if "What is 4" in prompt:
            raise ValueError("this prompt is too long:\n2 tokens")
        return solve(prompt, base)

    command = ["evaluate", "--url", fake(say).url, "--tasks", str(data / "gsm8k.jsonl")]
    assert main([*command, "--num-fewshot", "0"]) == 0
    printed = capsys.readouterr().out
    assert (
        "gsm8k: 4 questions, 1 skipped" in printed
        and "this prompt is too long: 2 tokens" in printed
    )
    out = data / "out.json"
    command[-1] = f"{data}/human_eval.jsonl,{command[-1]}"
    assert main([*command, "--num-fewshot", "4", "--run-code", "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert "gsm8k: the server refuses every question: " in error
    assert [task["task"] for task in json.loads(out.read_text())["decoded"]] == ["human_eval"]


@pytest.mark.parametrize(
    ("base_steps", "our_steps", "message"),
    [(0, 0, "no LoRA step ran in"), (1, 1, "5 LoRA steps ran although"), (None, None, "without")],
    ids=["none", "strangers", "stock"],
)
def test_a_run_that_shows_nothing_is_an_error(
    data: Path,
    fake: Any,
    capsys: pytest.CaptureFixture[str],
    base_steps: int | None,
    our_steps: int,
    message: str,
) -> None:
    server = fake(solve)
    if base_steps is None:
        server.steps.clear()
    server.lora_steps = lambda base, tokens: base_steps if base else our_steps
    out = data / "out.json"
    command = ["evaluate", "--url", server.url, "--tasks", str(data / "gsm8k.jsonl")]
    assert main([*command, "--num-fewshot", "0", "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and not out.exists()


def test_a_server_of_our_own_serves_the_model_with_the_adapter(
    data: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    @contextmanager
    def server(model: Path, arguments: list[str]) -> Iterator[Any]:
        started.append((model, arguments))
        running = Endpoint.at(fake(solve).url)
        running.log = data / "log"  # type: ignore[attr-defined]
        yield running

    monkeypatch.setattr(evaluation, "Server", server)
    monkeypatch.setattr(evaluation, "read_config", lambda _: evaluation.Decoding())
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: True)
    command = ["evaluate", "org/model", "--adapter", "dir", "--tasks", "gsm8k", "--data", str(data)]
    assert main([*command, "--num-fewshot", "0", "--dtype", "float32"]) == 0
    ((model, arguments),) = started
    assert model == Path("org/model")
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert flags["--dtype"] == "float32"
    assert json.loads(flags["--additional-config"]) == {"lora_drop": {"adapter": "dir"}}


def test_what_cannot_be_asked_is_refused(
    data: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", fake(solve).url]
    sums, half = ["--tasks", str(data / "gsm8k.jsonl")], ["--tasks", str(data / "human_eval.jsonl")]
    cloze = data / "cloze.jsonl"
    cloze.write_text('{"context": "The sky is", "continuation": "blue"}\n')
    own = ["model", "--adapter", "dir"]
    for wrong, message in (
        ([*url, *half], "human_eval: scoring it runs programs that the model writes"),
        ([*own, *url, "--num-fewshot", "0", *sums], "the server at --url has its own"),
        ([*own, *url, "--tasks", str(cloze)], "nothing is decoded by a server"),
        ([*url, "--dtype", "half", "--num-fewshot", "0", *sums], "--dtype half: the server at"),
        (["--num-fewshot", "0", *sums], "MODEL and --adapter DIR: missing"),
        ([*url, "--num-fewshot", "0", "--tasks", f"{sums[1]},{cloze}"], "MODEL and --adapter DIR"),
        (
            ["--url", "http://127.0.0.1:9", "--num-fewshot", "0", *sums],
            "no OpenAI-compatible server",
        ),
    ):
        assert main(["evaluate", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
