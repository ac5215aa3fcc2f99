"""`--corpus self`: written once per model, and enough to fit an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_models import make_chat_model

from lora_drop_vllm.cli import main
from lora_drop_vllm.method.adapter import read_config
from lora_drop_vllm.training import self_corpus as module
from lora_drop_vllm.training.corpus import read_corpus
from lora_drop_vllm.training.self_corpus import self_corpus, self_path

COUNT = 12
CHAT = [{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "Far."}]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model", "qwen2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone, with few conversations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "COUNT", COUNT)
    return tmp_path / "cache"


def writes(asked: list[list[str]], returncode: int = 0) -> Any:
    """A stand-in for the process that generates."""

    def run(command: list[str], **how: Any) -> Any:
        asked.append(command)
        out = Path(command[command.index("--out") + 1])
        count = int(command[command.index("--count") + 1])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text((json.dumps({"messages": CHAT}) + "\n") * count)
        out.with_name(f"{out.name}.meta.json").write_text(json.dumps({"documents": count}))
        return SimpleNamespace(returncode=returncode)

    return run


def test_it_is_written_once_and_says_where(
    chat_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(module.subprocess, "run", writes(asked))
    first = read_corpus(["self"], str(chat_model))
    assert len(first.documents) == COUNT and cache in self_path(str(chat_model)).parents
    assert f"the model writes {COUNT} conversations to {cache}" in capsys.readouterr().err
    assert read_corpus(["self"], str(chat_model)) == first and len(asked) == 1
    assert f"{COUNT} conversations that the model wrote, in {cache}" in capsys.readouterr().err
    assert first.origin[0][0] == "self"


def test_every_model_has_its_own(chat_model: Path, tmp_path: Path) -> None:
    """Weights and template identify a model; the folder's place does not."""
    paths = {self_path(str(chat_model)).name}
    copy = tmp_path / "elsewhere" / "model"
    shutil.copytree(chat_model, copy)
    assert self_path(str(copy)).name in paths
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    paths.add(self_path(str(copy)).name)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    paths.add(self_path(str(copy)).name)
    assert len(paths) == 3
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        self_path("nowhere")


def test_what_keeps_it_from_being_written_is_said(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.subprocess, "run", writes([], returncode=2))
    with pytest.raises(RuntimeError, match=r"--corpus self: `.* generate .*` failed, see above"):
        self_corpus(str(chat_model))
    self_path(str(chat_model)).with_suffix(".jsonl.meta.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes would write it; run `lora-drop gen"):
        self_corpus(str(chat_model))


@pytest.mark.engine
def test_fit_needs_nothing_but_a_model(
    chat_model: Path, tmp_path: Path, cache: Path, capsys: Any
) -> None:
    """A Qwen2 with a chat template writes conversations by itself; a second adapter reuses them."""
    assert main(["fit", str(chat_model), "--rho", "0.25", "--out", str(tmp_path / "a")]) == 0
    (path,) = (cache / "lora_drop_vllm" / "self").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == COUNT and {m["role"] for x in lines for m in x["messages"]} >= {"user"}
    written = path.stat().st_mtime_ns
    given = ["--k", "2", "--corpus", "self:1", "--out", str(tmp_path / "b")]
    assert main(["fit", str(chat_model), *given]) == 0
    assert path.stat().st_mtime_ns == written
    assert read_config(tmp_path / "a").k == 3 and read_config(tmp_path / "b").k == 2
