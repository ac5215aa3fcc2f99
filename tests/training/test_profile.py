"""The profile of a model, and the layers chosen by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_model, make_tokenizer

from lora_drop_vllm.cli import main
from lora_drop_vllm.decode.decoder import ForcedDecoder, base_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.method.adapter import BaseModel, read_config
from lora_drop_vllm.method.layers import rank_layers
from lora_drop_vllm.plots import plot_training
from lora_drop_vllm.training.corpus import Corpus
from lora_drop_vllm.training.layer_profile import Profile, read_profile
from lora_drop_vllm.training.layer_runs import Run, first_layers, measure_runs
from lora_drop_vllm.training.layerwise import fit_tensors
from lora_drop_vllm.training.profiler import draw, measure
from lora_drop_vllm.training.samples import sample
from lora_drop_vllm.training.settings import Settings

WORDS = "Bees find their way home by the position of the sun. A bee that has found flowers dances. "
SETTINGS = Settings(length=64, tokens=2048, rank=4)
BASE = BaseModel("llama", 8, 128)


def samples_of(model: Any) -> Any:
    return sample(model, make_tokenizer(), Corpus([WORDS * 40, WORDS[:40] * 9], 0), SETTINGS)


def test_similarity_is_eq_17(smooth_model: Path) -> None:
    """The reference is the Hugging Face model's hidden states, sequence by sequence."""
    model: Any = load_model(smooth_model)
    samples, distances = samples_of(model), (1, 3, 10)
    found = measure(model, samples, distances)
    cosines: dict[tuple[int, int], list[torch.Tensor]] = {}
    for part in samples:
        for number in range(int(part.schedule.sequence.max()) + 1):
            tokens = part.tokens[part.schedule.sequence == number][None]
            streams: list[torch.Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda m, i, out, to=streams: to.append(out[0]))
                for layer in model.model.layers
            ]
            with torch.no_grad():
                model(tokens)
            for hook in hooks:
                hook.remove()
            for layer, stream in enumerate(streams):
                for distance in distances:
                    pair = stream[:-distance], stream[distance:]
                    cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1)
                    cosines.setdefault((layer, distance), []).append(cosine)
    assert found.tokens == sum(part.count for part in samples)
    for layer in range(8):
        want = [float(torch.cat(cosines[layer, distance]).mean()) for distance in distances]
        assert found.similarity[layer] == pytest.approx(want, abs=1e-4)


def test_kl_finds_the_layer_that_does_least(smooth_model: Path) -> None:
    model: Any = load_model(smooth_model)
    for projection in (model.model.layers[5].self_attn.o_proj, model.model.layers[5].mlp.down_proj):
        projection.weight.data.zero_()
    config = SETTINGS.config("tiny", base_model(model))
    kl = measure(model, samples_of(model), (1,), config).kl
    assert kl is not None and [value is None for value in kl] == [
        i not in (3, 4, 5, 6) for i in range(8)
    ]
    assert 0 <= kl[5] < 1e-4 < 1e-3 < min(kl[3], kl[4], kl[6])  # type: ignore[type-var]


@pytest.mark.parametrize("injection", ["block", "attn"])
def test_the_kl_of_a_run_is_that_of_an_adapter_that_has_not_seen_its_text(
    smooth_model: Path, injection: str
) -> None:
    """The KL matches `fit_tensors` without the batch, through the parallel decode on it."""
    model: Any = load_model(smooth_model)
    samples = samples_of(model)
    settings = replace(SETTINGS, layers=(4, 5), injection=injection)
    config = settings.config("tiny", base_model(model))
    runs = measure_runs(model, samples, config, {2})
    counts = [run.count for run in runs]
    assert counts.count(1) == 4 and counts.count(2) == 3 and len(samples) <= 10
    tensors = fit_tensors(model, [*samples[:2], *samples[3:]], config)
    decoder, part = ForcedDecoder(model, Adapter(config, tensors)), samples[2]
    with torch.no_grad():
        hidden, base = (
            x[part.schedule.lora] for x in decoder.hidden_and_base(part.tokens, part.schedule)
        )
        p, q = (decoder.logits(x).log_softmax(-1) for x in (base, hidden))
    want = float((p.exp() * (p - q)).sum(-1).mean())
    (found,) = [run.kl for run in runs if run.layers == [4, 5]]
    assert found == pytest.approx(want, rel=1e-3)


def test_long_runs_begin_at_a_few_places() -> None:
    eligible = list(range(3, 29))
    assert first_layers(1, eligible) == eligible
    assert first_layers(20, eligible) == [3, 4, 5, 6, 7, 8, 9]
    assert first_layers(7, eligible) == [3, 6, 8, 11, 14, 17, 19, 22]
    assert first_layers(26, eligible) == [3]


def test_the_lowest_kl_chooses_the_run() -> None:
    runs = [Run(3, 1, 0.1), Run(4, 1, 0.2), Run(5, 1, 0.3), Run(6, 1, 0.2)]
    runs += [Run(3, 2, 0.6), Run(4, 2, 0.5), Run(5, 2, 0.7)]
    by_kl = Profile(BASE, 1, [1], [[0.1 * n] for n in range(8)], runs)
    assert by_kl.choose("contiguous", 2) == [4, 5] and by_kl.choose("kl", 2) == [3, 4]
    assert by_kl.choose("similarity", 2) == [5, 6] and by_kl.choose("contiguous", 1) == [3]
    assert replace(by_kl, runs=None).choose("contiguous", 2) == [5, 6]
    assert not any(by_kl.report([0.01])["drop_layers"]["0.01"].values())
    with pytest.raises(
        ValueError, match=r"3 layers are to drop, but the profile has runs of 1, 2;"
    ):
        by_kl.choose("contiguous", 3)


def test_attentions_are_chosen_by_their_own_kl() -> None:
    runs = [Run(n, 1, 0.1 * n) for n in range(3, 7)]
    both = Profile(BASE, 1, [1], [[0.0]] * 8, runs, [Run(n, 1, -0.1 * n) for n in range(3, 7)])
    assert both.choose("kl", 2) == [3, 4] and both.choose("kl", 2, "attn") == [5, 6]
    assert replace(both, attention_runs=None).choose("kl", 2, "attn") == [3, 4]


def test_scores_choose_the_layers() -> None:
    scores = [9.0, 9.0, 9.0, 0.5, 0.1, 0.4, 0.5, 0.3, 9.0]
    eligible = list(range(3, 8))
    assert rank_layers("similarity", 2, eligible, scores) == [3, 6]
    assert rank_layers("similarity", 1, eligible, scores) == [3]
    assert rank_layers("contiguous", 2, eligible, scores) == [5, 6]
    assert rank_layers("uniform", 2, eligible, scores) == [4, 6]
    assert rank_layers("contiguous", 5, eligible, scores) == eligible


def test_the_horizon_ends_where_similarity_falls_below_a_half() -> None:
    profile = Profile(BASE, 1, [1, 2, 3, 5, 10], [[0.9, 0.7, 0.5, 0.4, 0.6]] * 8)
    assert profile.horizon(profile.similarity[0]) == 3
    assert profile.horizon([0.4, 0.9, 0.9, 0.9, 0.9]) == 0
    assert profile.horizon([0.9] * 5) == profile.horizon([0.5] * 5) == 10


def test_the_command_writes_what_fit_reads(
    smooth_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.txt").write_text(WORDS * 40)
    given = [str(smooth_model), "--corpus", str(tmp_path / "corpus.txt"), "--length", "64"]
    given += ["--rank", "4", "--tokens", "1024"]
    out = tmp_path / "profile"
    flags = ["--criterion", "kl", "--distances", "1,4", "--rho", "0.25,0.5", "--out", str(out)]
    assert main(["profile", *given, *flags]) == 0
    assert "rho 0.5, kl: [" in capsys.readouterr().out
    report = json.loads((out / "profile.json").read_text())
    assert len(report["scores"]) == len(report["horizon"]) == 8 and report["distances"] == [1, 4]
    wanted = report["drop_layers"]["0.5"]
    assert all(len(layers) == 2 for layers in wanted.values()) and len(wanted) == 3
    for choice in wanted:
        fit = ["fit", *given, "--rho", "0.5", "--layers", choice, "--out", str(tmp_path / choice)]
        assert main([*fit, "--profile", str(out / "profile.json")]) == 0
        assert read_config(tmp_path / choice).drop_layers == wanted[choice]
    again = ["fit", *given, "--rho", "0.5", "--layers", "similarity", "--out", str(tmp_path / "b")]
    assert main(again) == 0
    assert len(read_config(tmp_path / "b").drop_layers) == 2
    uniform = [*again, "--profile", str(out / "profile.json"), "--layers", "uniform"]
    assert main(uniform) == 2
    assert "--layers uniform does not use it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distances", "64"], "--distances 64: no two tokens of a document"),
        (["--rho", "0"], "--rho 0.0: expected more than 0"),
        (["--k", "0"], "--k 0: expected 1 or more"),
        (["--plots"], "--plots: matplotlib is not installed; pip install"),
        (
            ["--criterion", "kl", "--tokens", "128"],
            "--criterion kl: expected three or more rows of",
        ),
    ],
    ids=["distance", "rho", "k", "plots", "rows"],
)
def test_what_cannot_be_profiled_is_refused(
    smooth_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    without_matplotlib: None,
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "corpus.txt").write_text(WORDS * 40)
    command = ["profile", str(smooth_model), "--corpus", str(tmp_path / "corpus.txt")]
    command += ["--length", "64", "--tokens", "1024", "--rank", "4"]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not what `lora-drop profile` writes"),
        ('{"base_model": {}}', "not what `lora-drop profile` writes"),
    ],
    ids=["missing", "json", "keys"],
)
def test_a_file_that_is_no_profile_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_profile(tmp_path / "profile.json", BASE)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    profile = Profile(BASE, 1, [1], [[0.5]] * 8)
    by_kl = replace(profile, runs=[Run(n, 1, 0.5) for n in range(3, 7)])
    (tmp_path / "profile.json").write_text(json.dumps(by_kl.report([0.25])))
    assert read_profile(tmp_path / "profile.json", BASE) == by_kl
    (tmp_path / "profile.json").write_text(json.dumps(profile.report([0.5])))
    assert read_profile(tmp_path / "profile.json", BASE) == profile
    with pytest.raises(ValueError, match="made for llama, 8 layers of width 128; the model is"):
        read_profile(tmp_path / "profile.json", BaseModel("llama", 8, 64))
    with pytest.raises(ValueError, match="--layers kl: the profile has none"):
        profile.scores("kl")


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profile = Profile(BASE, 1, [1, 2], [[0.9, 0.4]] * 8)
    draw(profile, tmp_path)
    assert not (tmp_path / "runs.png").exists()
    draw(replace(profile, runs=[Run(3, 1, 0.1), Run(3, 2, 0.2)]), tmp_path)
    log = [{"step": n, "loss": 1.0, "ce": 1.0, "kl": 1.0, "hidden": 0.0, "lr": 1.0} for n in (1, 2)]
    plot_training(log, tmp_path / "training.png")
    names = ("distances.png", "layers.png", "runs.png", "training.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
