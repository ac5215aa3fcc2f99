"""lm-eval's model `lora_drop`, compared with the oracle and lm-eval's own, and the command."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Forced, Oracle
from serving import settings_of
from tiny import make_adapter, make_tokenizer, prompt_of

from lora_drop_vllm.cli import main

DROP, K = [3, 5], 3
PAIRS = [("The sky is", " blue"), ("Two and two", " are four, he said"), ("", "a story of bees")]


@pytest.fixture(scope="module")
def folder(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with a tokenizer, and of an adapter."""
    root = tmp_path_factory.mktemp("lm_eval")
    shutil.copytree(models["llama"], root / "model")
    make_tokenizer().save_pretrained(root / "model")
    make_adapter(root / "adapter", models["llama"], drop_layers=DROP, k=K)
    return root


@pytest.fixture(scope="module")
def lm(folder: Path) -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    from lora_drop_vllm.evaluation.lm_eval_model import LoRADropLM

    given = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    return LoRADropLM(str(folder / "model"), str(folder / "adapter"), **given)


@pytest.fixture
def settings(lm: Any) -> Any:
    adapter = lm._decoder.adapter
    return settings_of(adapter.config, {n: t.detach() for n, t in adapter.tensors().items()})


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> Any:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, n) for n, given in enumerate(arguments)]


def said(lm: Any, settings: Any, context: list[int], continuation: list[int]) -> float:
    """Log-probability of a continuation, by the oracle."""
    tokens, prompt = context + continuation, len(context)
    full = [t < prompt or (t - prompt) % (K + 1) == K for t in range(len(tokens))]
    with torch.no_grad():
        log_p = Forced(lm.model, settings).logits_of(tokens, full).log_softmax(-1)
    return sum(float(log_p[t - 1, tokens[t]]) for t in range(prompt, len(tokens)))


def test_continuations_run_under_the_schedule(lm: Any, settings: Any) -> None:
    found = lm.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        first, second = (lm.tokenizer(text).input_ids for text in (context, continuation))
        assert value == pytest.approx(said(lm, settings, first or [1], second), abs=1e-3)
    (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("a story of bees",)]))
    assert rolled == pytest.approx(found[2][0], abs=1e-3)


def test_long_texts_roll_in_windows(lm: Any, settings: Any, monkeypatch: Any) -> None:
    """The token before a window is its prompt; the last window has a longer prompt."""
    monkeypatch.setattr(lm, "_max_length", 10)
    text = prompt_of(25)
    monkeypatch.setattr(lm, "tok_encode", lambda string: text)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("…",)]))
    windows = [([1], text[:10]), (text[9:10], text[10:20]), (text[14:20], text[20:])]
    assert found == pytest.approx(sum(said(lm, settings, *w) for w in windows), abs=1e-3)


def test_a_context_too_long_loses_its_beginning(lm: Any, settings: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lm, "_max_length", 12)
    context, continuation = prompt_of(30), prompt_of(5, seed=1)
    ((found, _),) = lm._loglikelihood_tokens([(None, context, continuation)])
    assert found == pytest.approx(said(lm, settings, context[-8:], continuation), abs=1e-3)
    for wrong in ([], prompt_of(13)):
        with pytest.raises(ValueError, match=f"continuation of {len(wrong)} tokens .* 1 to 12"):
            lm._loglikelihood_tokens([(("a", "b"), context, wrong)])


def test_generation_is_what_decoding_says(lm: Any, settings: Any) -> None:
    """One batch holds prompts of different lengths."""
    prompts = [prompt_of(5), prompt_of(9)]
    context = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    out = lm._model_generate(context, 9 + 7, [], attention_mask=mask, do_sample=False)
    for prompt, row in zip(prompts, out[:, 9:].tolist(), strict=True):
        assert row == Oracle(lm.model, settings).decode(prompt, 7)


def test_generation_ends_at_a_stop_string(lm: Any, monkeypatch: Any) -> None:
    words = iter(b"one two. three")
    tokenizer = make_tokenizer()

    def letter(decoder: Any, prompts: Any, said: torch.Tensor) -> torch.Tensor:
        token = tokenizer(chr(next(words))).input_ids
        return torch.tensor(token * len(prompts))

    monkeypatch.setattr("lora_drop_vllm.evaluation.lm_eval_model.next_tokens", letter)
    asked = {"until": ["."], "max_gen_toks": 30, "do_sample": False}
    assert lm.generate_until(requests("generate_until", [("a", asked), ("bc", asked)])) == [
        "one two",
        "one two",
    ]
    assert next(words) == ord(" ")  # it stopped there
    with pytest.raises(ValueError, match="only greedy decoding works here; serve the model"):
        lm.generate_until(requests("generate_until", [("a", {**asked, "do_sample": True})]))
    with pytest.raises(ValueError, match=r"generation_kwargs \{'num_beams': 4"):
        lm.generate_until(requests("generate_until", [("a", {**asked, "num_beams": 4})]))


TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
""",
    "tiny_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
    "tiny_answer": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: Any) -> list[str]:
    """The command `lora-drop lm-eval` on three tiny tasks, without the model."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    only_ours = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only_ours)  # lm-eval has thousands
    monkeypatch.setattr(sys, "argv", ["lora-drop"])
    lines = [
        {"question": question, "choices": [" yes", " no"], "gold": number % 2}
        for number, question in enumerate(["Is it wet?", "Is the sun cold?", "Do bees sing?"])
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: train\n"
        head += f"dataset_kwargs: {{data_files: {tmp_path}/lines.jsonl}}\n"
        (tmp_path / f"{name}.yaml").write_text(head + text)
    return ["lm-eval", "--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--device",
            "cpu", "--output_path", str(tmp_path / "out.json")]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    """The newest results below a folder."""
    newest = max(folder.glob("**/out*.json"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(newest.read_text())
    newest.unlink()
    return found


def test_the_command_runs_lm_evals_tasks(command: list[str], folder: Path, tmp_path: Path) -> None:
    """With k = 0 the scores equal those of lm-eval's own model; otherwise they differ."""
    pair = f"pretrained={folder}/model,dtype=float32"
    assert main([*command, "--model", "hf", "--model_args", pair]) == 0
    base = results(tmp_path)["results"]
    pair += f",adapter={folder}/adapter"
    assert main([*command, "--model", "lora_drop", "--model_args", f"{pair},k=0"]) == 0
    off = results(tmp_path)["results"]
    assert main([*command, "--model", "lora_drop", "--model_args", pair]) == 0
    on = results(tmp_path)
    assert on["config"]["lora_drop"]["drop_layers"] == DROP and on["config"]["lora_drop"]["k"] == K
    assert base.keys() == off.keys() == on["results"].keys() == TASKS.keys()
    words = "word_perplexity,none"
    assert off["tiny_text"][words] == pytest.approx(base["tiny_text"][words], rel=1e-4)
    assert not math.isclose(on["results"]["tiny_text"][words], off["tiny_text"][words], rel_tol=0.1)
    assert off["tiny_choice"]["acc,none"] == base["tiny_choice"]["acc,none"]
    assert on["results"]["tiny_answer"]["exact_match,none"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": None}, "--model_args adapter=None: expected the folder of an adapter"),
        ({"adapter": "."}, "there is no adapter_config.json in it"),
        ({"k": -1}, "--model_args k=-1: expected 0 or more"),
        ({"k": True}, "--model_args k=True: expected 0 or more"),
        ({"pretrained": "nowhere"}, "--model_args pretrained=nowhere: no such model folder"),
        ({"peft": "x"}, "--model_args peft=x: not supported with LoRA-Drop"),
    ],
    ids=["no-adapter", "adapter", "k", "k-bool", "model", "peft"],
)
def test_what_cannot_be_evaluated_is_refused(
    lm: Any, folder: Path, given: dict[str, Any], message: str
) -> None:
    right = {"pretrained": f"{folder}/model", "adapter": f"{folder}/adapter", "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        type(lm)(**{**right, **given})


def test_without_lm_eval_the_command_says_what_to_install(capsys: Any, monkeypatch: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a)
    )
    assert main(["lm-eval", "run", "--tasks", "piqa"]) == 2
    assert capsys.readouterr().err == (
        "lora-drop: lm-eval: not installed; pip install 'lora_drop_vllm[eval]'\n"
    )
    assert main(["lm-eval"]) == 0 and main(["lm-eval", "--help"]) == 0
    assert "examples:" in capsys.readouterr().out
