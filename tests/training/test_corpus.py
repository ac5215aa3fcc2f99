"""Corpus files, and the rows and schedules made from them."""

from __future__ import annotations

import gzip
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer

from lora_drop_vllm.training.corpus import Corpus, read_corpus
from lora_drop_vllm.training.rows import CHARACTERS, Rows, random_schedule, stack

DOCUMENTS = [letter * (40 + 13 * n) for n, letter in enumerate("abcdefgh")]


def test_text_and_jsonl_are_read_gzipped_or_not(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("two", " ", "drei"))
    (tmp_path / "a.txt").write_bytes(b"one\n\nline")
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    found = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"])
    assert found == Corpus(["one\n\nline", "two", "drei", "two", "drei"], 0)


def test_unusable_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xff\xfe\nalso\n")
    bad = [b"{", b"[1]", b'{"words": "a"}', b'{"text": 3}', b"\xff"]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([*bad, b'{"text": "good"}']))
    found = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert found == Corpus(["good\nalso\n", "good"], 1 + len(bad))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, r"a\.txt: cannot be read \(No such file"),
        ("a.txt", b" \n\n", "empty; name a source with text"),
        ("a.txt", b"PK\x03\x04\x00\x00", "a binary file"),
        ("a.txt", b"\xff\xfe\n\xff", r"line 1 is no valid Unicode \(2 such\)"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"line 1 is no valid Unicode \(1 such\)"),
        ("a.jsonl", b"", "empty; name a source with text"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1 is no JSON object with a text in its field"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"cannot be read \(Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"words " * 999)[:40], r"cannot be read \(Compressed file"),
    ],
    ids=["missing", "blank", "binary", "no-utf8", "half-a-pair", "empty", "keys", "no-gzip", "cut"],
)
def test_a_file_without_text_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus([tmp_path / name])


def dataset(folder: Path) -> str:
    """The command-line name of a dataset with two configurations."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    configs = {
        "small": [{"text": "one", "source": "web"}, {"text": " "}, {"text": None}],
        "chat": [{"messages": chat}, {"messages": chat[:1]}],
    }
    card = "---\nconfigs:\n"
    for name, rows in configs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        card += f"  - config_name: {name}\n    default: {json.dumps(name == 'small')}\n"
        card += f"    data_files:\n      - split: train\n        path: {name}.jsonl\n"
    (folder / "README.md").write_text(f"{card}---\n")
    return f"datasets:{folder}"


@pytest.fixture
def quiet_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install '.[train]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("quiet_datasets")
def test_datasets_are_read_by_name(tmp_path: Path) -> None:
    name = dataset(tmp_path)
    for source in (name, f"{name}:small", f"{name}::train", f"{name}:small:train[:3]"):
        found = read_corpus([source])
        assert found == Corpus(["one"], 1)
        assert found.documents[0].source == "web"
        assert found.origin == [(source, 3)]
    (conversation,) = read_corpus([f"{name}:chat"]).documents
    assert conversation.messages[1]["content"] == "ho"
    (tmp_path / "a.txt").write_text("and a file")
    both = read_corpus([tmp_path / "a.txt", name])
    assert both.documents == ["and a file", "one"]


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (":large", "cannot be read .*large.*; expected datasets:NAME"),
        (":small:valid", "cannot be read .*valid"),
        ("/nowhere", "cannot be read .*nowhere"),
        (":chat:train[1:]", r"row 0 \(messages\) is none with a text in its.*\(1 such\)"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(
    tmp_path: Path, behind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_corpus([dataset(tmp_path) + behind])


def test_without_the_package_datasets_their_names_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets; pip install"):
        read_corpus(["datasets:allenai/c4"])


def test_a_sequence_is_one_piece_of_one_document() -> None:
    tokenizer = make_tokenizer()
    rows = list(islice(Rows(Corpus(DOCUMENTS, 0), tokenizer, 32, seed=0), 40))
    for row in rows:
        assert 24 < len(row.tokens) == sum(row.lengths) <= 32 and min(row.lengths) >= 8
        for piece in torch.tensor(row.tokens).split(row.lengths):
            assert len(piece.unique()) == 1
    tokens, sequence = stack(rows[:3], 32)
    assert sequence.max() == sum(len(row.lengths) for row in rows[:3]) - 1
    for n, row in enumerate(rows[:3]):
        assert tokens[n][sequence[n] >= 0].tolist() == row.tokens
        assert sequence[n][sequence[n] >= 0].unique_consecutive(return_counts=True)[
            1
        ].tolist() == list(row.lengths)


def test_one_pass_visits_all_and_the_seed_decides_the_order() -> None:
    def first_pass(seed: int) -> list[list[int]]:
        rows = Rows(Corpus(DOCUMENTS, 0), make_tokenizer(), 16, seed)
        found = []
        while not rows.position.epoch:
            found.append(next(rows).tokens)
        return found

    assert len({token for row in first_pass(0) for token in row}) == len(DOCUMENTS)
    assert first_pass(0) == first_pass(0) != first_pass(1)
    long = Corpus(["x" * CHARACTERS * 16 * 3, "y" * 400], 0)
    assert len(Rows(long, make_tokenizer(), 16, 0)._passages) == 5


def test_sources_take_turns_where_asked(tmp_path: Path) -> None:
    lines = [{"text": "a" * 400, "source": "large"}] * 6 + [{"text": "b" * 400, "source": "b"}]
    lines += [{"text": "c" * 400}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = read_corpus([tmp_path / "a.jsonl"])

    def first_tokens(turns: bool) -> str:
        """First tokens of one row per passage."""
        rows = Rows(corpus, make_tokenizer(), 16, 0, turns=turns)
        found = []
        while not rows.position.epoch:
            found.append(next(rows).tokens[0])
            rows.leave_passage()
        return make_tokenizer().decode(found).replace(" ", "")

    turned = first_tokens(True)
    assert sorted(turned) == sorted(first_tokens(False)) == list("a" * 12 + "b" * 2 + "c" * 4)
    assert [sorted(turned[start : start + 3]) for start in (0, 3)] == [list("abc")] * 2
    assert sorted(turned[6:10]) == list("aacc") and turned[10:] == "a" * 8
    assert first_tokens(False)[:6] != turned[:6]


@pytest.mark.parametrize("start", [0, 3, 17, 40])
def test_rows_go_on_from_a_position(start: int) -> None:
    """The position may lie within a passage, and in a later pass over the corpus."""
    whole = Rows(Corpus(DOCUMENTS, 0), make_tokenizer(), 24, seed=5)
    for _ in range(start):
        next(whole)
    again = Rows(Corpus(DOCUMENTS, 0), make_tokenizer(), 24, 5, whole.position)
    assert [next(again) for _ in range(30)] == [next(whole) for _ in range(30)]


def test_a_corpus_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="--corpus: 20 tokens, but a row takes 32; give more"):
        Rows(Corpus(["a" * 20], 0), make_tokenizer(), 32, 0)
    with pytest.raises(ValueError, match="--corpus: 0 tokens, but a row takes 32"):
        Rows(Corpus(["short"] * 20, 0), make_tokenizer(), 32, 0)
    with pytest.raises(ValueError, match="--length 4: expected 8 tokens or more"):
        Rows(Corpus(DOCUMENTS, 0), make_tokenizer(), 4, 0)


def test_prompts_and_phases_are_drawn_anew_and_alike() -> None:
    rows = list(islice(Rows(Corpus(DOCUMENTS, 0), make_tokenizer(), 64, 0), 50))
    _, sequence = stack(rows, 64)
    schedules = [random_schedule(sequence, rows, 3, seed=1, number=n) for n in (0, 0, 1)]
    assert torch.equal(schedules[0].full, schedules[1].full)
    assert not torch.equal(schedules[0].full, schedules[2].full)
    lengths = sequence[sequence >= 0].bincount()
    owner = sequence.clamp(min=0)
    first = torch.where(schedules[0].lora, schedules[0].position, 99).flatten()
    prompt = torch.full_like(lengths, 99).scatter_reduce(0, owner.flatten(), first, "amin")
    assert (
        (prompt >= 1).all() and (prompt <= lengths // 2 + 2).all() and len(set(prompt.tolist())) > 9
    )
