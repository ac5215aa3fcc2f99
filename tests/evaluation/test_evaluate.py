"""Quality: measures compared with the oracle's, task files, the command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import make_chat_model
from oracle import Forced, Oracle
from serving import settings_of
from tiny import make_adapter, make_tokenizer, prompt_of

from lora_drop_vllm.cli import main
from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import on_sequences, perplexity
from lora_drop_vllm.evaluation.scoring import Candidate, run_task, score
from lora_drop_vllm.evaluation.significance import Comparison, MeanLoss, mcnemar
from lora_drop_vllm.evaluation.tasks import Example, Task, read_task, read_text
from lora_drop_vllm.model_card import CARD, FIGURES, write_card

DROP, K = [3, 5], 3
LINES = [
    {"context": "It rains. ", "choices": ["Take an umbrella.", "Sing."], "gold": 0},
    {"query": "Question: what is wet?\n", "choices": ["rain", "sand", "fire"], "gold": 0},
    {"context_options": ["A cat saw a dog, the cat", "A cat saw a dog, the dog"],
     "continuation": "ran away.", "gold": 1},
]  # fmt: skip


@pytest.fixture
def pair(models: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path) -> Any:
    """A decoder, and its oracle's settings."""
    config, tensors = make_adapter(tmp_path / "adapter", models["llama"], drop_layers=DROP, k=K)
    return ForcedDecoder(hf_models["llama"], Adapter(config, tensors)), settings_of(config, tensors)


def test_perplexity_is_the_oracles(pair: Any) -> None:
    decoder, settings = pair
    windows = torch.tensor([prompt_of(20, seed) for seed in range(3)])
    found = perplexity(decoder, windows, 6, K)
    full = [t < 6 or (t - 6) % 4 == 3 for t in range(20)]
    losses, base_losses, same, kl = [], [], [], []
    for window in windows.tolist():
        logits = Forced(decoder.model, settings).logits_of(window, full).log_softmax(-1)
        base = Forced(decoder.model, settings).logits_of(window, [True] * 20).log_softmax(-1)
        for t in range(6, 19):
            losses.append((full[t], -logits[t, window[t + 1]]))
            base_losses.append(-base[t, window[t + 1]])
            same.append(logits[t].argmax() == base[t].argmax())
            kl.append((base[t].exp() * (base[t] - logits[t])).sum())
    for kind, own in (("all", (True, False)), ("full", (True,)), ("lora", (False,))):
        chosen = torch.stack([loss for is_full, loss in losses if is_full in own])
        assert found[kind].tokens == len(chosen)
        assert found[kind].perplexity == pytest.approx(float(chosen.mean().exp()), rel=1e-3)
    everything = found["all"]
    assert everything.base_perplexity == pytest.approx(
        float(torch.stack(base_losses).mean().exp()), rel=1e-3
    )
    assert everything.kl == pytest.approx(float(torch.stack(kl).mean()), rel=1e-3)
    assert everything.agreement == pytest.approx(float(torch.stack(same).float().mean()))


def test_replies_of_any_length_count_after_their_own_prompts(pair: Any) -> None:
    decoder, _ = pair
    replies = [(prompt_of(20, 0), 6), (prompt_of(9, 1), 4), (prompt_of(14, 2), 6)]
    found = on_sequences(decoder, replies, K)
    alone = [perplexity(decoder, torch.tensor([tokens]), n, K) for tokens, n in replies]
    for kind in ("all", "full", "lora"):
        parts = [one[kind] for one in alone if kind in one]
        tokens = sum(part.tokens for part in parts)
        assert found[kind].tokens == tokens
        kl = sum(part.kl * part.tokens for part in parts) / tokens
        assert found[kind].kl == pytest.approx(kl, rel=1e-4)


def test_the_command_measures_chat_replies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_chat_model(tmp_path / "model", "qwen2")
    config, _ = make_adapter(tmp_path / "adapter", model, drop_layers=DROP)
    write_card(tmp_path / "adapter", config)
    talk = [{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "Far."}]
    plain = {"prompt": "Q: 1 + 1\nA: 2\n\nQ: 2 + 3\nA:", "completion": " 5\n\nQ:", "cut": True}
    lines = [json.dumps({"messages": talk}), json.dumps(plain)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "text.jsonl").write_text('{"text": "no conversation at all"}\n')
    command = ["evaluate", str(model), "--adapter", str(tmp_path / "adapter"), "--chat"]
    report = tmp_path / "adapter" / FIGURES
    assert main([*command, str(tmp_path / "chat.jsonl"), "--json", str(report)]) == 0
    assert "chat.jsonl, lora steps |" in (tmp_path / "adapter" / CARD).read_text()
    assert "chat.jsonl: 2 replies" in capsys.readouterr().out
    steps = json.loads(report.read_text())["chat"]["steps"]
    assert steps["lora"]["tokens"] > steps["full"]["tokens"] > 0
    assert main([*command, str(tmp_path / "text.jsonl")]) == 2
    assert "no replies; expected lines with `messages`, or with a" in capsys.readouterr().err
    assert main(["evaluate", "no-model", *command[2:], str(tmp_path / "missing.jsonl")]) == 2
    assert "--chat " in (said := capsys.readouterr().err) and "--corpus" not in said
    given = [*command, str(tmp_path / "chat.jsonl")]
    for flag, value in (("--dtype", "float32"), ("--max-tokens", "9"), ("--num-fewshot", "3")):
        assert main([*given, flag, value]) == 2
        assert f"{flag} {value}: nothing is decoded by a server" in capsys.readouterr().err
    os.mkfifo(pipe := tmp_path / "pipe")
    end = os.open(pipe, os.O_RDWR)
    assert main([*given, "--json", str(pipe)]) == 0
    assert json.loads(os.read(end, 1 << 16))["chat"] and pipe.is_fifo()
    os.close(end)
    assert main([*given, "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: cannot be written" in capsys.readouterr().err


def test_with_k_0_nothing_differs_from_the_base(pair: Any) -> None:
    found = perplexity(pair[0], torch.tensor([prompt_of(20)]), 6, 0)
    assert found.keys() == {"all", "full"}
    assert found["all"].perplexity == pytest.approx(found["all"].base_perplexity, rel=1e-4)
    assert found["all"].agreement == 1.0 and found["all"].kl < 1e-6


def test_a_cloze_answer_is_what_decoding_says(pair: Any) -> None:
    """The continuation that the oracle decodes freely scores as greedy; a changed one does not."""
    decoder, settings = pair
    prompts = [prompt_of(5), prompt_of(9)]
    oracles = [Oracle(decoder.model, settings) for _ in prompts]
    said = [oracle.decode(prompt, 6) for oracle, prompt in zip(oracles, prompts)]
    candidates = [Candidate(p + s, len(p)) for p, s in zip(prompts, said)]
    candidates.append(Candidate([*prompts[0], *said[0][:-1], (said[0][-1] + 1) % 500], 5))
    scores = score(decoder, candidates, K, "cloze")
    assert scores[:, 2].tolist() == [1, 1, 0]
    for row, oracle in enumerate(oracles):
        assert float(scores[row, 0]) == pytest.approx(sum(oracle.logprobs), abs=1e-3)
    assert scores[:, 4].tolist() == [4, 4, 4] and scores[:, 5].tolist() == [6, 6, 6]
    window = perplexity(decoder, torch.tensor([candidates[0].tokens]), 5, K)["all"]
    assert float(scores[0, 6]) == pytest.approx(window.kl * window.tokens, rel=1e-3)


def test_mcnemar_is_the_exact_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert mcnemar(3, 3) == 1.0
    found = Comparison.of([True, False, False, True], [True, True, True, False])
    assert (found.share, found.base, found.only_base, found.only_this) == (0.5, 0.75, 2, 1)
    assert found.share_se == pytest.approx((0.25 / 3) ** 0.5) and found.p_value == 1.0


def test_a_loss_is_taken_question_by_question() -> None:
    found = Comparison.of([True, False, False, True], [True, True, True, False])
    losses = torch.tensor([0.0, 1.0, 1.0, -1.0])
    assert found.loss == pytest.approx(float(losses.mean()))
    assert found.loss_se == pytest.approx(float(losses.std() / 2))
    same = Comparison.of([True, False], [True, False])
    mean = MeanLoss.of([found, same])
    assert same.loss == same.loss_se == 0 and mean.loss == found.loss / 2 and mean.tasks == 2
    assert mean.high - mean.low == pytest.approx(1.96 * found.loss_se)


def test_all_forms_of_a_task_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    task = read_task(path)
    assert task.name == "mixed" and task.skipped == 0
    assert task.examples[0].candidates[0] == ("It rains.", " Take an umbrella.")
    assert task.examples[1].candidates[2] == ("Question: what is wet?\nAnswer:", " fire")
    assert task.examples[2] == Example(
        (("A cat saw a dog, the cat", " ran away."), ("A cat saw a dog, the dog", " ran away.")), 1
    )
    path.write_text('{"context": "The sky is", "continuation": "blue"}\n')
    assert read_task(path).examples == [Example((("The sky is", " blue"),), None)]


def test_lines_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    good = json.dumps(LINES[0]).encode()
    bad = [
        b"\xff\xfe",
        b"{",
        b"[1]",
        b'{"context": "a", "choices": ["b"], "gold": 0}',
        b'{"context": "a", "choices": ["b", 3], "gold": 0}',
        b'{"context": "a", "choices": ["b", "c"], "gold": 2}',
        b'{"context": "a", "choices": ["b", "c"], "gold": true}',
        b'{"context": "a", "continuation": "b"}',
    ]
    path.write_bytes(b"\n".join([good, *bad, b"", good]))
    task = read_task(path)
    assert len(task.examples) == 2 and task.skipped == len(bad)
    assert len(read_task(path, limit=1).examples) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "the file is empty"),
        (bytes(range(256)) * 4, "line 1 is not"),
        (b'{"question": "a"}\n', r"line 1: keys \['question'\]: expected context or query"),
    ],
    ids=["missing", "empty", "binary", "keys"],
)
def test_a_task_file_without_a_question_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "task.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_task(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b" \n", "empty"), (b"ab\xff", r"not UTF-8 text \(byte 2\)")],
    ids=["missing", "empty", "binary"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path)


def test_questions_too_long_for_the_model_are_skipped(pair: Any) -> None:
    tokenizer = make_tokenizer()
    short = Example((("a", " b"), ("a", " c")), 0)
    long = Example((("a" * 3000, " b"), ("a", " c")), 0)
    result = run_task(pair[0], tokenizer, Task("task", [short, long], 1))
    assert (result.examples, result.skipped) == (1, 2)
    with pytest.raises(ValueError, match="no question fits into the model's 2048 positions"):
        run_task(pair[0], tokenizer, Task("task", [long], 0))


def test_the_command_reports_text_and_tasks(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["llama"], folder)
    make_tokenizer().save_pretrained(folder)
    make_adapter(tmp_path / "adapter", models["llama"], drop_layers=DROP)
    (tmp_path / "text.txt").write_text("Bees find their way home by the sun. " * 20)
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    (tmp_path / "cloze.jsonl").write_text('{"context": "The sky is", "continuation": "blue"}\n')
    command = ["evaluate", str(folder), "--adapter", str(tmp_path / "adapter")]
    inputs = ["--text", str(tmp_path / "text.txt"), "--limit", "2", "--data", str(tmp_path)]
    tasks = ["--tasks", f"choices,{tmp_path}/cloze.jsonl", "--json", str(tmp_path / "out.json")]
    assert main([*command, *inputs, *tasks]) == 0
    printed = capsys.readouterr().out
    assert "2 windows" in printed and "choices: 2 questions" in printed
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["text"]["steps"]["all"]["tokens"] == 2 * (256 - 48 - 1)
    choices, cloze = report["tasks"]
    assert choices["accuracy_per_byte"]["p_value"] <= 1 and cloze["accuracy_per_byte"] is None
    assert cloze["accuracy"]["base"] in (0, 1) and cloze["lora_share"] == pytest.approx(3 / 5)
    assert choices["kl"] > 1e-3 and f"KL {choices['kl']:.3f}" in printed
    for wrong, message in (
        ([], "nothing to evaluate on"),
        (["--tasks", "none", "--data", str(tmp_path)], "none.jsonl: cannot be read"),
        (["--tasks", "choices", "--json", str(tmp_path / "no/out.json")], "there is no folder"),
    ):
        assert main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
