"""A mix of whole layers and attentions: what is proposed, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_drop_vllm.cli import main
from lora_drop_vllm.method.adapter import read_config
from lora_drop_vllm.training.mix import Wanted
from lora_drop_vllm.training.settings import Settings

WORDS = "Bees find their way home by the position of the sun. A bee that has found flowers dances. "
# attention: 4 x 8 x 8 weights, MLP: 3 x 8 x 32; a quarter of a layer's weights are its attention's
SHAPE: Any = SimpleNamespace(
    num_hidden_layers=8,
    hidden_size=8,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
)
KL = [None, None, None, 0.4, 0.1, 0.3, 0.3, None]
ATTENTION = [None, None, None, 0.3, 0.09, 0.01, 0.04, None]


def propose(context: int = 0, **wish: float) -> tuple[list[int], list[int]]:
    given = {"save_kv": None, "speed": None} | wish
    more = dict(context=context, settings=Settings(), criterion="kl", model_config=SHAPE)
    wanted = Wanted.of(**given, **more)
    assert wanted is not None
    mix = wanted.propose(SHAPE, KL, ATTENTION)
    assert mix.kl == pytest.approx(
        sum(KL[i] for i in mix.drop_layers) + sum(ATTENTION[i] for i in mix.drop_attention)
    )
    assert mix.kv_saved >= wish.get("save_kv", 0) and mix.ideal_speed >= wish.get("speed", 0)
    return mix.drop_layers, mix.drop_attention


def test_a_wanted_kv_saving_takes_the_lowest_kl_of_either_kind() -> None:
    assert propose(save_kv=1 / 8 * 3 / 4) == ([], [5])
    assert propose(save_kv=0.2) == ([], [4, 5, 6])
    assert propose(save_kv=3 / 8) == ([], [3, 4, 5, 6])


def test_a_wanted_speed_takes_the_lowest_kl_per_time() -> None:
    """Per layer's time: attentions 1.2, 0.36, 0.04, 0.16; whole layers 0.4, 0.1, 0.3, 0.3."""
    assert propose(speed=1.01) == ([], [5])
    assert propose(speed=1.1) == ([4], [5])
    assert propose(speed=1.15) == ([4], [5, 6])
    assert propose(speed=1.2) == ([4, 6], [5])
    assert propose(speed=1.6) == ([3, 4, 5, 6], [])


def test_at_a_long_context_the_attention_is_nearly_all_of_the_time() -> None:
    assert propose(speed=1.2, context=100_000) == ([], [5, 6])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save-kv", "0.2", "--speed", "1.2"], "--speed 1.2: expected no --save-kv beside it"),
        (["--context", "9"], "--context 9: expected --speed beside it"),
        (["--speed", "1.2"], "--speed 1.2: expected --criterion kl beside it"),
        (
            ["--save-kv", "0.5", "--criterion", "kl"],
            "--save-kv 0.5: expected more than 0, at most 0.375: with k=3, 4 of 8 layers may drop",
        ),
        (["--speed", "1", "--criterion", "kl"], "--speed 1.0: expected more than 1, at most 1.6"),
        (
            ["--save-kv", "0.2", "--criterion", "kl", "--kv", "write"],
            "--save-kv 0.2: expected --kv skip: --kv write saves none",
        ),
        (
            ["--speed", "1.2", "--criterion", "kl", "--injection", "attn"],
            "--speed 1.2: expected --injection block or attn_mlp",
        ),
    ],
    ids=["both", "context", "criterion", "too-much", "too-little", "write", "attn"],
)
def test_what_cannot_be_wanted_is_refused(
    smooth_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "corpus.txt").write_text(WORDS * 40)
    command = ["profile", str(smooth_model), "--corpus", str(tmp_path / "corpus.txt")]
    command += ["--length", "64", "--tokens", "1024", "--rank", "4", "--out", str(tmp_path / "a")]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a").exists()


def test_the_command_proposes_what_fit_takes(
    smooth_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.txt").write_text(WORDS * 40)
    given = [str(smooth_model), "--corpus", str(tmp_path / "corpus.txt"), "--length", "64"]
    given += ["--rank", "4", "--tokens", "1024"]
    flags = ["--criterion", "kl", "--rho", "0.25", "--distances", "1", "--speed", "1.2"]
    assert main(["profile", *given, *flags, "--out", str(tmp_path / "profile")]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    report = json.loads((tmp_path / "profile/profile.json").read_text())
    assert [value is None for value in report["attention_kl"]] == [
        value is None for value in report["kl"]
    ]
    assert report["mix"]["ideal_speed"] >= 1.2 and printed.startswith("mix: --")
    chosen = printed.removeprefix("mix: ").split(" saves")[0].split()
    assert main(["fit", *given, *chosen, "--out", str(tmp_path / "a")]) == 0
    config = read_config(tmp_path / "a")
    assert config.drop_layers == report["mix"]["drop_layers"]
    assert config.drop_attention == report["mix"]["drop_attention"]
