"""Sources with shares of the tokens: their notation, and the resulting rows."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer
from training_runs import STEPS, WORDS, assert_equal

from lora_drop_vllm.cli import main
from lora_drop_vllm.training.corpus import Corpus, read_corpus
from lora_drop_vllm.training.gradient import Trainer
from lora_drop_vllm.training.mixture import MixedPosition, MixedRows, read_position, rows_of
from lora_drop_vllm.training.rows import Position, Rows

SIZES = {"a": 3000, "b": 700, "c": 20_000}


def sources(folder: Path) -> dict[str, Path]:
    """One file per letter, which holds only that letter."""
    for letter, size in SIZES.items():
        lines = [json.dumps({"text": letter * n}) for n in [50 + size // 40] * 20]
        (folder / f"{letter}.jsonl").write_text("\n".join(lines))
    return {letter: folder / f"{letter}.jsonl" for letter in SIZES}


def mixed(folder: Path, shares: dict[str, str], **more: Any) -> MixedRows:
    files = sources(folder)
    corpus = read_corpus([f"{files[letter]}:{share}" for letter, share in shares.items()])
    rows = rows_of(corpus, make_tokenizer(), 64, seed=3, **more)
    assert isinstance(rows, MixedRows)
    return rows


@pytest.mark.parametrize(
    ("shares", "count"),
    [
        ({"a": "0.7", "b": "0.3"}, 100),
        ({"a": "0.7", "b": "0.3"}, 10),
        ({"a": "6", "b": "1", "c": "3"}, 200),
        ({"b": "0.98", "c": "0.02"}, 400),
    ],
    ids=["long", "short", "three", "uneven"],
)
def test_tokens_are_shared_as_written(tmp_path: Path, shares: dict[str, str], count: int) -> None:
    """The shares hold for files of any size, to within a row at any time."""
    rows = mixed(tmp_path, shares)
    tokenizer = make_tokenizer()
    found = dict.fromkeys(shares, 0)
    whole = math.fsum(map(float, shares.values()))
    for row in islice(rows, count):
        (letter,) = set(tokenizer.decode(row.tokens))
        found[letter] += len(row.tokens)
        for name, share in shares.items():
            wanted = float(share) / whole * sum(found.values())
            assert abs(found[name] - wanted) <= 64, (found, name)


def test_every_passage_of_a_source_comes_before_any_comes_again(tmp_path: Path) -> None:
    files = sources(tmp_path)
    plain = Rows(read_corpus([files["b"]]), make_tokenizer(), 64, seed=3)
    rows = mixed(tmp_path, {"a": "0.5", "b": "0.5"})
    of_b = [row for row in islice(rows, 120) if make_tokenizer().decode(row.tokens)[0] == "b"]
    assert of_b == list(islice(plain, len(of_b))) and plain.position.epoch > 1
    assert rows.position.parts[1].epoch == plain.position.epoch > rows.position.epoch


@pytest.mark.parametrize("start", [0, 1, 2, 7, 30])
def test_a_mixture_goes_on_from_a_position(tmp_path: Path, start: int) -> None:
    shares = {"a": "0.6", "b": "0.3", "c": "0.1"}
    whole = mixed(tmp_path, shares)
    for _ in range(start):
        next(whole)
    kept = read_position(json.loads(json.dumps(whole.position)))
    assert isinstance(kept, MixedPosition) and kept == whole.position
    again = mixed(tmp_path, shares, position=kept)
    assert list(islice(again, 20)) == list(islice(whole, 20))
    assert read_position([1, 2, 3]) == Position(1, 2, 3)


@pytest.mark.parametrize(
    ("source", "share"),
    [
        ("self:0.7", "self:0.7"),
        ("{}/b.txt:2", "b.txt:2"),
        ("{}/b.txt:1e-1", "b.txt:0.1"),
        ("{}/with:colons.txt:3", "with:colons.txt:3"),
    ],
)
def test_a_number_behind_the_last_colon_is_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, share: str
) -> None:
    for name in ("b.txt", "with:colons.txt", "self.txt"):
        (tmp_path / name).write_text("words")
    monkeypatch.setattr(
        "lora_drop_vllm.training.corpus.self_corpus", lambda model: tmp_path / "self.txt"
    )
    found = read_corpus([source.format(tmp_path)], "a model")
    assert list(found.origin) == [(share, 5)] and found.parts[0][1] == Corpus(["words"], 0)


@pytest.mark.parametrize("name", ["chapter:2", "a:b", "datasets:name:config:train[:10]", "x:"])
def test_other_colons_belong_to_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("words")
    assert not read_corpus([tmp_path / name]).parts


def test_a_split_of_a_dataset_is_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def reading(source: str) -> tuple[list[str], list[str]]:
        asked.append(source)
        return ["words"], []

    monkeypatch.setattr("lora_drop_vllm.training.corpus._read_dataset", reading)
    assert not read_corpus(["datasets:allenai/c4:en:train[:1%]"]).parts
    (part,) = read_corpus(["datasets:allenai/c4:en:train[:1%]:0.25"]).parts
    assert asked == ["datasets:allenai/c4:en:train[:1%]"] * 2 and part[0] == 0.25


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jsonl:0.5", "b.jsonl"], r"b\.jsonl: other sources have a share; give each source one"),
        (["a.jsonl:0"], r"a\.jsonl:0: expected a share above 0"),
        (["a.jsonl:-1"], "expected a share above 0"),
        (["a.jsonl:nan"], "expected a share above 0"),
        (["a.jsonl:inf"], "expected a share above 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    sources(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_corpus([f"{tmp_path}/{name}" for name in names])


@pytest.fixture
def given(smooth_model: Path, tmp_path: Path) -> list[str]:
    """The model, and a mixture of two kinds of text."""
    texts = {"bees": [WORDS * 3, WORDS[::-1] * 2], "lists": ["one, two, three, " * 40] * 3}
    for name, documents in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    corpus = [f"{tmp_path}/bees.jsonl:0.75", f"{tmp_path}/lists.jsonl:0.25"]
    return [str(smooth_model), "--corpus", *corpus, "--length", "48", "--rank", "4", "--rho", "0.5"]


def test_training_on_a_mixture_resumes(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train = ["train", *given, "--steps", str(STEPS), "--batch", "2", "--from", "zero",
             "--save-every", "3"]  # fmt: skip
    assert main([*train, "--out", str(tmp_path / "whole")]) == 0
    real = Trainer.advance

    def failing(self: Trainer) -> dict[str, float]:
        if self.step == 7:
            raise RuntimeError("pulled the plug")
        return real(self)

    monkeypatch.setattr(Trainer, "advance", failing)
    assert main([*train, "--out", str(tmp_path / "cut")]) == 2
    monkeypatch.setattr(Trainer, "advance", real)
    other = [word.replace("0.75", "0.5") for word in train]
    assert main([*other, "--out", str(tmp_path / "cut")]) == 2
    assert "bees.jsonl:0.75" in capsys.readouterr().err
    assert main([*train, "--out", str(tmp_path / "cut")]) == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_fit_repeats_a_small_source(smooth_model: Path, tmp_path: Path, capsys: Any) -> None:
    files = sources(tmp_path)
    command = ["fit", str(smooth_model), "--corpus", f"{files['c']}:0.5", f"{files['b']}:0.5"]
    command += ["--tokens", "6400", "--length", "64", "--rank", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert int(capsys.readouterr().out.split()[-2]) > 6300


def test_fit_and_profile_take_a_mixture(given: list[str], tmp_path: Path) -> None:
    tokens = ["--tokens", "960"]
    assert main(["fit", *given, *tokens, "--out", str(tmp_path / "fit")]) == 0
    small = [word for word in given if word not in ("--rho", "0.5")]
    assert main(["profile", *small, *tokens, "--out", str(tmp_path / "p")]) == 0
