"""Training: the steps, and killed runs that resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_model, make_adapter, make_tokenizer
from training_runs import STEPS, WORDS, assert_equal, tensors_of

from lora_drop_vllm.cli import main
from lora_drop_vllm.method.adapter import read_config
from lora_drop_vllm.training.checkpoint import FILE, LOG
from lora_drop_vllm.training.corpus import Corpus
from lora_drop_vllm.training.gradient import Plan, Trainer
from lora_drop_vllm.training.objective import Losses
from lora_drop_vllm.training.rows import Rows


@pytest.fixture(scope="module")
def given(smooth_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, corpus and the settings of a short run."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [WORDS * 3, WORDS[::-1] * 2, "one, two, three, " * 40, "a line of text. " * 30]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["train", str(smooth_model), "--corpus", str(corpus), "--length", "48", "--rank", "4",
            "--rho", "0.5", "--steps", str(STEPS), "--batch", "2", "--warmup", "2",
            "--save-every", "3", "--from", "zero", "--no-bf16"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*given, "--out", str(out)]) == 0
    return out


def test_training_lowers_the_loss(whole: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (whole / LOG).read_text().splitlines()]
    assert len(losses) == STEPS and sum(losses[-3:]) < 0.98 * sum(losses[:3])


@pytest.mark.parametrize("step", [1, 3, 8, 11])
def test_an_interrupted_run_ends_alike(
    given: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A log entry may exist without its checkpoint; only steps after the checkpoint repeat."""
    real, taken = Trainer.advance, []

    def failing(self: Trainer) -> dict[str, float]:
        if self.step == step:
            raise RuntimeError("pulled the plug")
        return real(self)

    def counting(self: Trainer) -> dict[str, float]:
        taken.append(self.step)
        return real(self)

    monkeypatch.setattr(Trainer, "advance", failing)
    assert main([*given, "--out", str(tmp_path)]) == 2
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": ')
    monkeypatch.setattr(Trainer, "advance", counting)
    assert main([*given, "--out", str(tmp_path)]) == 0
    assert taken == list(range(step - step % 3, STEPS))
    assert_equal(tmp_path, whole)


def test_a_finished_run_is_left_as_it_is(
    given: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, made = (whole / FILE).stat().st_mtime_ns, read_config(whole)
    fit = ["fit", *given[1:6], "--tokens", "960", "--rank", "2", "--layers", "4"]
    assert main([*fit, "--out", str(whole)]) == 0 and read_config(whole) != made
    assert main([*given, "--out", str(whole)]) == 0
    assert f"{STEPS} steps, loss" in capsys.readouterr().out
    assert (whole / FILE).stat().st_mtime_ns == before
    assert read_config(whole) == made  # what another command wrote there since is replaced


@pytest.mark.parametrize(
    "flags",
    [
        ["--accumulate", "2", "--checkpointing"],
        ["--bf16", "--hidden", "1", "--from", "fit", "--rank", "2"],
        ["--reuse", "previous", "--injection", "attn_mlp", "--kv", "write", "--k", "5"],
    ],
    ids=["accumulate", "bf16-fit", "previous"],
)
def test_other_ways_to_train_run(given: list[str], tmp_path: Path, flags: list[str]) -> None:
    assert main([*given, *flags, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path).values())


def test_bfloat16_is_chosen_by_the_processor_and_kept_by_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for able, expected in (
        ({"avx512_bf16": True}, (True, "matmul")),
        ({"amx_bf16": True}, (True, "matmul")),
        ({"avx512_f": True}, (False, "sdpa")),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        open_plan = Plan().on_this_machine({})
        assert (open_plan.bf16, open_plan.attention) == expected
        resumed = Plan().on_this_machine({"bf16": not expected[0], "attention": "flex"})
        assert (resumed.bf16, resumed.attention) == (not expected[0], "flex")
        asked = Plan(bf16=False, attention="flex")
        assert asked.on_this_machine({"bf16": True, "attention": "sdpa"}) == asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Plan().on_this_machine({}) == Plan(bf16=False, attention="sdpa")


def test_bfloat16_follows_fp32(given: list[str], whole: Path, tmp_path: Path) -> None:
    """The same run in bfloat16, by plain matrix products: the loss curves agree."""
    own = [flag for flag in given if flag != "--no-bf16"]
    assert main([*own, "--bf16", "--attention", "matmul", "--out", str(tmp_path)]) == 0
    logs = [
        [json.loads(line) for line in (out / LOG).read_text().splitlines()]
        for out in (tmp_path, whole)
    ]
    for half, full in zip(*logs, strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.02)
        assert half["kl_lora"] == pytest.approx(full["kl_lora"], rel=0.05, abs=0.01)


def test_accumulation_is_the_mean_of_its_parts(smooth_model: Path, tmp_path: Path) -> None:
    """Checkpointing changes nothing, and two halves make the step of the whole."""
    config, tensors = make_adapter(tmp_path, smooth_model, drop_layers=[4, 5])
    from lora_drop_vllm.training.checkpoint import Checkpoint
    from lora_drop_vllm.training.gradient import Devices
    from lora_drop_vllm.training.rows import Position

    corpus, found = Corpus([WORDS * 20], 0), []
    for checkpointing in (False, True):
        plan = Plan(batch=2, accumulate=2, checkpointing=checkpointing, lr=1e-2, warmup=0)
        begin = Checkpoint(config, {}, 0, Position(), tensors)
        taken = Rows(corpus, make_tokenizer(), 48, 0)
        trainer = Trainer(load_model(smooth_model), taken, plan, 0, begin, Devices())
        entry = trainer.advance()
        found.append(entry["loss"])
        changed = trainer.adapter.tensors()
        assert all(not torch.equal(changed[n].detach(), t.float()) for n, t in tensors.items())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert entry["tokens"] == 4 * 48


def test_going_on_from_an_adapter_takes_its_settings(
    given: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_whole = [*given[:6], "--steps", "1", "--from", str(whole), "--out", str(tmp_path / "a")]
    assert main(from_whole) == 0
    assert read_config(tmp_path / "a") == read_config(whole)
    assert main([*from_whole, "--out", str(tmp_path / "b"), "--kv", "write"]) == 2
    assert "--kv write: the adapter that --from" in capsys.readouterr().err
    assert main([*from_whole, "--out", str(tmp_path / "b"), "--profile", "p.json"]) == 2
    assert "--profile p.json: --from" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    real = Trainer._backward

    def poisoned(self: Trainer, *args: Any) -> Losses:
        return Losses(real(self, *args).values * (float("nan") if self.step == 4 else 1))

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert "step 5: the loss is nan" in capsys.readouterr().err.splitlines()[-1]
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path).values())
    assert (tmp_path / FILE).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--lr", "-1"], "--lr -1.0: expected more than 0"),
        (["--refresh-weight", "-1"], "--refresh-weight -1.0: expected 0 or more"),
        (["--ce", "0", "--kl", "0"], "--ce, --kl, --hidden: all 0"),
        (["--from", "nowhere"], "--from nowhere: expected fit, zero or an adapter ("),
        (["--rank", "0"], "--rank 0: expected 1 to 128"),
        (["--plots"], "--plots: matplotlib is not installed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value).replace("--", ""),
)
def test_what_cannot_be_trained_is_refused(
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    without_matplotlib: None,
    flags: list[str],
    message: str,
) -> None:
    assert main([*given, "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_is_refused(
    given: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, "--out", str(whole), "--lr", "0.5"]) == 2
    assert "holds a run with --lr 0.001, not 0.5" in capsys.readouterr().err
    model = Path(shutil.copytree(given[1], tmp_path / Path(given[1]).name))
    tokens = model / "model.safetensors"
    tokens.write_bytes(tokens.read_bytes()[:-4] + bytes(4))
    assert main([given[0], str(model), *given[2:], "--out", str(whole)]) == 2
    assert f"holds a run of another model that is called {model.name}" in capsys.readouterr().err
    (tmp_path / FILE).write_bytes(b"nothing")
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert "not a checkpoint of `lora-drop train`" in capsys.readouterr().err


def test_the_rate_rises_and_falls() -> None:
    plan = Plan(steps=10, warmup=2, lr=1.0)
    rates = [plan.rate(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[2:], rates[3:])) and rates[-1] > 0
