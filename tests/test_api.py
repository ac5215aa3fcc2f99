"""The public names: all there, imported when used, and documented by examples that run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from training_runs import WORDS

import lora_drop_vllm

ROOT = Path(__file__).parent.parent
FUNCTIONS = ("check", "cost", "evaluate", "fit", "profile", "train")


def for_type_checkers() -> set[str]:
    """What `__init__.py` imports under `if TYPE_CHECKING`."""
    tree = ast.parse((ROOT / "lora_drop_vllm/__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    (block,) = (node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{alias.asname}" for node in imports for alias in node.names}


def test_all_public_names_are_listed_and_there() -> None:
    found = {n: getattr(lora_drop_vllm, n).__module__ for n in lora_drop_vllm.__all__}
    assert {f"{module}.{name}" for name, module in found.items()} == for_type_checkers()
    assert set(lora_drop_vllm.__all__) <= set(dir(lora_drop_vllm))
    for name in lora_drop_vllm.__all__:
        assert getattr(lora_drop_vllm, name).__name__ == name
    with pytest.raises(AttributeError, match="'lora_drop_vllm' has no attribute 'adapt'"):
        lora_drop_vllm.adapt  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_return_frozen_data_and_say_so(name: str) -> None:
    function = getattr(lora_drop_vllm, name)
    returned = getattr(lora_drop_vllm, inspect.signature(function).return_annotation)
    assert dataclasses.is_dataclass(returned) and returned.__dataclass_params__.frozen
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +[\w, ]*\b{parameter}\b[\w, ]*: ", function.__doc__, re.MULTILINE)
    assert "Raises:\n        ValueError: " in function.__doc__


@pytest.mark.parametrize("name", [*lora_drop_vllm.__all__])
def test_dataclasses_explain_their_attributes(name: str) -> None:
    found = getattr(lora_drop_vllm, name)
    if name in FUNCTIONS:
        return
    for field in dataclasses.fields(found):
        explained = rf"^ +[\w, ]*\b{field.name}\b[\w, ]*: "
        assert re.search(explained, found.__doc__, re.MULTILINE), field.name


def examples() -> dict[str, str]:
    """Code in docs/api.md, by its heading."""
    text = (ROOT / "docs/api.md").read_text()
    return dict(re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def test_the_examples_of_the_docs_run(
    smooth_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of them in one namespace, as a reader would type them."""
    assert set(examples()) == set(FUNCTIONS)
    (tmp_path / "model").symlink_to(smooth_model)
    (tmp_path / "books.txt").write_text(WORDS * 200)
    question = {
        "context": "Bees find their way home",
        "choices": ["by the sun", "by bus"],
        "gold": 0,
    }
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for heading, code in examples().items():
        exec(compile(code, f"docs/api.md, {heading}", "exec"), names)
    assert [row.rho for row in names["table"].rows] == [0.25, 0.5]
    assert names["measured"].path == Path("profile/profile.json")
    assert names["fitted"].config.drop_layers == names["measured"].drop_layers[0.5]["similarity"]
    assert names["fitted"].tokens == 4096 and names["fitted"].skipped == 0
    assert names["trained"].steps == len(names["trained"].log) == 8
    assert names["trained"].config.drop_layers == names["fitted"].config.drop_layers
    assert list(names["pair"].config.drop_layers) == names["trained"].config.drop_layers
    assert names["scored"].tasks[0].examples == 1 and names["scored"].text.windows == 4
    printed = capsys.readouterr().out
    assert str(names["table"]) in printed and str(names["scored"]) in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": [0]}, "--k 0: expected 1 or more"),
        ({"tokens": 0}, "--tokens 0: expected 1 or more"),
        ({"prompt": -1}, "--prompt -1: expected 0 or more"),
        ({"context": -1}, "--context -1: expected 0 or more"),
        ({"dtype": "int8"}, "--dtype int8: expected one of bfloat16, float16, float32"),
    ],
    ids=["k", "tokens", "prompt", "context", "dtype"],
)
def test_cost_refuses_what_no_flag_lets_through(
    models: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_drop_vllm.cost(models["llama"], **settings)


def test_profile_refuses_an_unknown_criterion(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--criterion best: expected one of similarity, kl"):
        lora_drop_vllm.profile("model", [], lora_drop_vllm.Settings(), tmp_path, criterion="best")
