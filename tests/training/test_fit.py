"""Adapters in closed form: the regression, the layers in order, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_model, make_tokenizer
from torch import Tensor

from lora_drop_vllm.cli import main
from lora_drop_vllm.config import resolve
from lora_drop_vllm.decode.decoder import ForcedDecoder, base_model, refresh, update
from lora_drop_vllm.decode.pretrained import open_model
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.evaluation.divergence import perplexity
from lora_drop_vllm.method.adapter import BaseModel, load_tensors, read_config
from lora_drop_vllm.method.reuse import REUSE
from lora_drop_vllm.training.corpus import Corpus
from lora_drop_vllm.training.layerwise import fit_layer, fit_tensors
from lora_drop_vllm.training.regression import Moments, fit_site
from lora_drop_vllm.training.samples import sample
from lora_drop_vllm.training.settings import Settings

WORDS = "Bees find their way home by the position of the sun. A bee that has found flowers dances. "


def moments(x: Tensor, y: Tensor, c: Tensor | None, beta: float, pieces: int = 1) -> Moments:
    found = Moments.zero(x.shape[1], x.device)
    for n in torch.arange(len(x)).chunk(pieces):
        found.add(x[n], y[n], None if c is None else c[n], beta)
    return found


@pytest.mark.parametrize("reuse", ["anchor", "update", "none"])
def test_a_low_rank_map_and_a_gate_are_found(reuse: str) -> None:
    rule, scale = REUSE[reuse], 2.0
    x, c, noise = (torch.randn(400, 32) for _ in range(3))
    low = torch.randn(32, 4) @ torch.randn(4, 32) / 8
    gate = torch.rand(32)

    def reused(gate: Tensor | None) -> Tensor:
        kept = 0 * c if not rule.keeps_state else c if gate is None else gate * c
        return rule.beta * x + kept

    y = reused(gate if rule.difference else None) + x @ low + 0.01 * noise
    state = c if rule.keeps_state else None
    parts = [moments(x[n], y[n], c[n] if state is not None else None, rule.beta)
             for n in torch.arange(400).split(300)]  # fmt: skip
    A, B, fitted = fit_site(*parts, rule, 4, scale)
    assert A.shape == (4, 32) and B.shape == (32, 4) and (fitted is None) != rule.difference
    result = reused(fitted) + scale * x @ A.T @ B.T
    assert (result - y).std() < 0.1 * (reused(fitted) - y).std()
    if fitted is not None:
        torch.testing.assert_close(fitted, gate, atol=0.2, rtol=0)


def test_sums_do_not_depend_on_the_batches() -> None:
    x, y, c = (torch.randn(90, 16) for _ in range(3))
    one, many = moments(x, y, c, 1.0), moments(x, y, c, 1.0, pieces=7)
    for name in ("xx", "xe", "xc", "ce", "cc"):
        torch.testing.assert_close(getattr(many, name), getattr(one, name), atol=1e-4, rtol=0)
    assert one.rows == many.rows == 90


def test_noise_is_not_fitted() -> None:
    """With few rows and nothing to learn, the strongest ridge wins and the map stays small."""
    x, y, held_x, held_y = (torch.randn(40, 32) for _ in range(4))
    A, B, _ = fit_site(
        moments(x, y, None, 0.0), moments(held_x, held_y, None, 0.0), REUSE["none"], 8, 1.0
    )
    free = torch.linalg.lstsq(torch.cat((x, held_x)), torch.cat((y, held_y))).solution
    assert (A.T @ B.T).norm() < 0.5 * free.norm()


@pytest.mark.parametrize(
    ("reuse", "kv", "injection"),
    [
        ("update", "skip", "block"),
        ("update", "write", "attn_mlp"),
        ("anchor", "skip", "attn_mlp"),
        ("none", "write", "block"),
        ("update", "skip", "attn"),
    ],
)
def test_a_fitted_adapter_is_nearer_to_the_base(
    smooth_model: Path, reuse: str, kv: str, injection: str
) -> None:
    model: Any = load_model(smooth_model)
    settings = Settings(rho=0.5, reuse=reuse, kv=kv, injection=injection, rank=64, length=64)
    config = settings.config("tiny", base_model(model))
    samples = sample(model, make_tokenizer(), Corpus([WORDS * 200], 0), settings)
    fitted = fit_tensors(model, samples, config)
    zero = {n: t.new_ones(t.shape) if "gate" in n else 0 * t for n, t in fitted.items()}
    windows = torch.tensor(make_tokenizer()(WORDS * 9).input_ids[: 5 * 128]).view(5, 128)
    near, far = (
        perplexity(ForcedDecoder(model, Adapter(config, tensors)), windows, 32, 3)["lora"].kl
        for tensors in (fitted, zero)
    )
    assert near < 0.95 * far


@pytest.mark.parametrize("injection", ["block", "attn_mlp", "attn"])
def test_previous_is_fitted_on_the_sums_of_its_inputs(smooth_model: Path, injection: str) -> None:
    """The layer comes nearer to the base model's; random layers after it blur the effect."""
    model: Any = load_model(smooth_model)
    settings = Settings(layers=(4,), reuse="previous", injection=injection, rank=64, length=64)
    config = settings.config("tiny", base_model(model))
    samples = sample(model, make_tokenizer(), Corpus([WORDS * 200], 0), settings)
    batches = [part.batch for part in samples]
    x = [model.model.embed_tokens(part.tokens) for part in samples]
    layer = model.model.layers[4]
    with torch.no_grad():
        of, goals, outputs = fit_layer(layer, x, x, batches, config, config.sites.parts[4])
        zero = {part: site._replace(B=0 * site.B) for part, site in of.items()}
        kept = [update(layer, y, refresh(layer, y, b, config.kv), b, config, zero)
                for y, b in zip(x, batches)]  # fmt: skip
    near, far = (sum((a - b).square().sum() for a, b in zip(y, goals)) for y in (outputs, kept))
    assert near < 0.9 * far


def test_rows_of_a_large_corpus_come_from_many_texts(smooth_model: Path) -> None:
    """A large corpus gives 20 rows from 26 long texts; a small corpus gives every row."""
    model: Any = load_model(smooth_model)
    settings = Settings(rho=0.5, rank=8, length=16, tokens=320)
    texts = Corpus([letter * 2000 for letter in "abcdefghijklmnopqrstuvwxyz"], 0)
    of = [set(row.tolist()) for s in sample(model, make_tokenizer(), texts, settings)
          for row in s.tokens]  # fmt: skip
    assert len(of) == 20 and len(set().union(*of)) > 10
    few = sample(model, make_tokenizer(), Corpus(["a" * 400], 0), settings)
    assert sum(len(s.tokens) for s in few) == 20


def corpus(folder: Path, times: int = 60) -> str:
    (folder / "corpus.txt").write_text(WORDS * times)
    return str(folder / "corpus.txt")


def test_the_command_writes_an_adapter_that_loads(
    smooth_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", str(smooth_model), "--corpus", corpus(tmp_path), "--length", "64"]
    assert main([*command, "--rho", "0.5", "--rank", "4", "--out", str(tmp_path / "a")]) == 0
    assert "drop layers [4, 5], rank 4, from" in capsys.readouterr().out
    other = ["--layers", "3,6", "--injection", "attn_mlp", "--kv", "write", "--tokens", "1024"]
    assert main([*command, *other, "--dtype", "bfloat16", "--out", str(tmp_path / "b")]) == 0
    mixed = ["--layers", "3", "--drop-attention", "5-6", "--rank", "4", "--tokens", "1024"]
    assert main([*command, *mixed, "--out", str(tmp_path / "mixed")]) == 0
    assert "drop layers [3], attention of [5, 6], rank 4, from" in capsys.readouterr().out
    alone = ["--drop-attention", "5", "--rank", "4", "--tokens", "1024"]
    assert main([*command, *alone, "--out", str(tmp_path / "alone")]) == 0
    base = BaseModel("llama", 8, 128)
    served = resolve({"adapter": str(tmp_path / "mixed")}, base)
    assert (served.drop_layers, served.drop_attention) == ((3,), (5, 6))
    assert read_config(tmp_path / "alone").drop_layers == []
    assert resolve({"adapter": str(tmp_path / "a")}, base).drop_layers == (4, 5)
    assert resolve({"adapter": str(tmp_path / "b")}, base).drop_layers == (3, 6)
    config = read_config(tmp_path / "b")
    assert "Made by `lora-drop fit` from 1024 tokens." in (tmp_path / "b/README.md").read_text()
    modes = {path.stat().st_mode for path in (tmp_path / "b").iterdir()}
    assert len(modes) == 1, "who may read the config may read the tensors"
    assert {t.dtype for t in load_tensors(tmp_path / "b", config).values()} == {torch.bfloat16}
    assert (config.base_model_name_or_path, config.injection, config.kv) == (
        "model",
        "attn_mlp",
        "write",
    )
    assert main([*command, "--rho", "0.5", "--rank", "4", "--out", str(tmp_path / "c")]) == 0
    first, again = (load_tensors(tmp_path / n, read_config(tmp_path / n)) for n in "ac")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("reuse", "--reuse best: expected one of previous, anchor, update, none"),
        ("kv", "--kv best: expected one of skip, write"),
        ("injection", "--injection best: expected one of block, attn_mlp, attn"),
        ("dtype", "--dtype best: expected one of float32, bfloat16, float16"),
    ],
)
def test_what_is_no_choice_is_refused_in_python_too(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{flag: "best"}).check(BaseModel("llama", 8, 128))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "0"], "--k 0: expected 1 or more"),
        (["--rank", "129"], "--rank 129: expected 1 to 128, the model's width"),
        (["--rank", "128", "--tokens", "128"], "--rank 128: expected two rows of --length 64"),
        (["--rho", "1.5"], "--rho 1.5: expected 0 <= rho <= 1"),
        (["--rho", "0.01"], "--rho 0.01: expected 0.125 or more"),
        (["--rho", "0.5", "--layers", "3,5"], "--rho 0.5: expected nothing"),
        (["--layers", "2,5"], "--layers 2,5: expected layers of [3, 4, 5, 6]"),
        (
            ["--layers", "4,5", "--drop-attention", "5"],
            "--drop-attention 5: expected none of --layers 4,5",
        ),
        (["--drop-attention", "7"], "--drop-attention 7: expected layers of [3, 4, 5, 6]"),
        (["--drop-attention", "5", "--rho", "0.5"], "--rho 0.5: expected nothing"),
        (
            ["--drop-attention", "5", "--layers", "uniform"],
            "--drop-attention 5: expected numbers for --layers too, not uniform",
        ),
        (
            ["--layers", "best"],
            "--layers best: expected contiguous, uniform, similarity, kl or 3,5,9",
        ),
        (["--tokens", "32"], "--tokens 32: expected --length 64 or more"),
        (["--tokens", "999999999999"], "are free; lower --tokens to"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value).replace("--", ""),
)
def test_what_cannot_be_fitted_is_refused(
    smooth_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    command = ["fit", str(smooth_model), "--corpus", corpus(tmp_path), "--length", "64"]
    assert main([*command, "--out", str(tmp_path / "out"), *flags]) == 2
    *progress, error, end = capsys.readouterr().err.split("\n")
    assert error.startswith("lora-drop: ") and message in error and not end
    assert all("weights" in line for line in progress)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((models["llama"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}: is quantized; take the model that it was"):
        open_model(str(tmp_path))
