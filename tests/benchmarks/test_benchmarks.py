"""The benchmarks' own arithmetic and bookkeeping; no engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import capacity
import chat
import decode_latency
import pytest
import quality_tables
import soak
import torch
from support import peers, quality_records, record, tables
from support.serve_figures import Block
from support.servers import Subject
from support.stream_client import Answer

from lora_drop_vllm.evaluation.divergence import Divergence
from lora_drop_vllm.evaluation.report import ChatResult, EvaluateResult
from lora_drop_vllm.evaluation.rollout_report import Rollout, RolloutsResult, figures
from lora_drop_vllm.evaluation.served_answers import Pass
from lora_drop_vllm.evaluation.significance import Estimate


def test_known_step_times_give_the_known_ratios() -> None:
    """32 layers of 1 ms and 4 ms of rest; 14 drop layers at no cost; one round disturbed."""
    rounds: Any = {
        "stock": [[36.0] * 100, [36.0] * 100, [36.0] * 99 + [500.0]],
        "k0": [[36.36] * 100] * 3,
        "fewer_layers": [[20.0] * 100] * 3,
        "lora_drop": [[22.0, 22.0, 22.0, 36.0] * 25] * 3,
    }
    found = decode_latency.metrics_of(rounds, 32, list(range(9, 23)), 3)
    assert found["layer_ms"] == 1.0 and found["rest_ms"] == 4.0
    assert found["speed_up"] == found["ideal_speed_up"] == round(4 * 36 / (3 * 22 + 36), 3)
    assert found["share_of_ideal"] == found["lora_step_over_ideal"] == 1.0
    assert found["k0_over_stock"] == 1.01
    assert (found["lora_step_ms"], found["full_step_ms"]) == (22.0, 36.0)
    assert found["p95_ms"]["lora_drop"] == 36.0  # a full step's, as Eq. 11 has it for k < 19
    # only 14 attentions drop, 3/7 of a layer each: 6 ms
    rounds["lora_drop"] = [[30.0, 30.0, 30.0, 36.0] * 25] * 3
    found = decode_latency.metrics_of(rounds, 32, [], 3, list(range(9, 23)), 3 / 7)
    assert found["speed_up"] == found["ideal_speed_up"] == round(4 * 36 / (3 * 30 + 36), 3)
    assert found["lora_step_over_ideal"] == 1.0


class Engines(dict[str, Any]):
    """Variants that answer with constant times; the drop path runs `share` of its LoRA steps."""

    def __init__(self, share: float) -> None:
        class Fake:
            def decode(self, batch: int, prompt: int, tokens: int, k: int | None) -> Any:
                wanted = (tokens - 1) - (tokens - 1) // ((k or 0) + 1)
                return {
                    "times": [1.0] * (tokens - 1),
                    "lora_steps": int(share * wanted),
                    "gpu_bytes": 0,
                }

        super().__init__({name: Fake() for name in ("stock", "lora_drop")})


def test_a_run_without_lora_steps_gives_no_figure() -> None:
    given = decode_latency.parse(["--tokens", "41", "--rounds", "1"])
    rounds, _ = decode_latency.measure(Engines(1.0), given, 1, 3, 64)
    assert set(rounds) == {"stock", "lora_drop", "k0"}  # k = 0 is asked of the LoRA-Drop engine
    with pytest.raises(RuntimeError, match="0 LoRA steps instead of 30"):
        decode_latency.measure(Engines(0.0), given, 1, 3, 64)


def test_a_record_says_what_drops_and_that_the_context_was_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without these flags its settings are those of the records from before they existed."""
    written: list[Any] = []
    monkeypatch.setattr(record, "write", lambda *found: written.append(found))
    rounds = {name: [[36.0] * 40] for name in ("stock", "k0", "lora_drop")}
    rounds["fewer_layers"] = [[20.0] * 40]
    for flags in ([], ["--filled", "--injection", "attn"]):
        given = decode_latency.parse(["--model", "1b", *flags])
        size = {"batch": 8, "k": 3, "prompt": 1024, "together": True}
        decode_latency.write(given, size, rounds, {})
    (_, plain, _), (_, filled, metrics) = written
    assert filled.keys() - plain.keys() == {"injection", "filled"}
    machine = {"cpu": "c", "cores": 2}
    row = tables.decode_latency({"settings": filled, "metrics": metrics, "machine": machine})[0]
    assert row[:3] == ["1b shape, eager, filled context", "8 × 1024", "attention"]
    assert row[-1] == "2 cores of c"


def test_a_record_says_how_wide_the_cpu_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: {"cpu": "c", "cores": 2})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert tables.machine_name(record.write("any", {}, {})) == "2 cores of c, AVX512"


@pytest.mark.parametrize("guess", [1, 4, 7, 9], ids=lambda n: f"from {n}")
def test_the_most_that_fit_are_found_from_any_guess(guess: int) -> None:
    assert capacity.most_that_fit(lambda count: count <= 7, guess) == 7


class Pool:
    """An engine whose pool holds so many blocks, two to a request, and lets no one else in."""

    def __init__(self, blocks: int, lora_steps: int) -> None:
        self.blocks, self.lora_steps = blocks, lora_steps

    def fill(self, batch: int, prompt: int, tokens: int, stop_at_preemption: bool = False) -> Any:
        running = min(batch, self.blocks // 2)
        return {
            "seconds": batch * tokens / running / 10,
            "preemptions": 0,
            "lora_steps": self.lora_steps,
            "blocks": self.blocks,
            "most_blocks": 2 * running,
            "most_running": running,
        }

    def close(self) -> None:
        pass


@pytest.mark.parametrize("lora_steps", [9, 0], ids=["dropping", "not dropping"])
def test_capacity_counts_who_runs_at_once(lora_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = iter([Pool(10, 0), Pool(14, lora_steps)])
    monkeypatch.setattr(capacity, "start", lambda *_: next(pools))
    monkeypatch.setattr(capacity, "make_shape", lambda *_: Path())
    given = capacity.parse(["--tokens", "100"])
    if not lora_steps:
        with pytest.raises(RuntimeError, match="no LoRA step ran"):
            capacity.run(given)
        return
    found = capacity.run(given)
    assert (found["stock"]["fit"], found["lora_drop"]["fit"], found["offered"]) == (5, 7, 14)
    assert found["stock"]["tokens_per_s"] == 50 and found["lora_drop"]["tokens_per_s"] == 70
    written = {"benchmark": "capacity", "settings": vars(given), "metrics": found}
    assert "5 → 7" in tables.of([written | {"machine": {"cpu": "c", "cores": 2}}])


def answer(ms: float, tokens: list[int]) -> Block:
    stamps = tuple(1 + n * ms / 1000 for n in range(len(tokens)))
    return Block([Answer(0.0, stamps, tuple(tokens), len(tokens))], None)


def test_peers_stand_beside_their_quality(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "num_hidden_layers": 12, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    subject = Subject("model", tmp_path, False, None)
    config = subject.resolved({"untrained": True, "reuse": "none", "layers": "uniform"})
    assert peers.offline_adapter(subject, config).config.drop_layers == [4, 6, 8, 10]
    blocks = {"stock": [answer(40, [1, 2, 3, 4])], "lora_drop": [answer(32, [1, 2, 9, 9])]}
    blocks |= {"skipping": [answer(30, [9, 9, 9, 9])], "ngram": [answer(20, [1, 2, 3, 5])]}
    quality = {"lora_drop": {"kl": 0.2, "agreement": 0.8}}
    quality["skipping"] = {"kl": 2.0, "agreement": 0.1}
    found = peers.rows(blocks, quality, config)
    assert [peer.get("speed_up") for peer in found] == [1.0, 1.25, 1.333, 2.0, None]
    assert [peer.get("kl") for peer in found] == [0.0, 0.2, 2.0, 0.0, None]
    assert found[3]["tokens_as_stock"] == 0.75
    settings = {"model": "m", "adapter": None, "compile": False, "concurrency": 1}
    settings |= {"context": 8, "tokens": 4}
    written = {"benchmark": "peers", "settings": settings, "metrics": {"peers": found}}
    table = tables.of([written | {"machine": {"cpu": "c", "cores": 2}}]).splitlines()
    assert len(table) == 7 and len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, []),
        ({"memory": [1000, 1021]}, ["rss_growth"]),
        ({"slower": 1.2}, ["p95_growth"]),
        ({"errors": ["lost"], "left": 1}, ["errors", "blocks_left"]),
    ],
    ids=str,
)
def test_a_soak_breaks_the_bounds_it_should(change: dict[str, Any], wanted: list[str]) -> None:
    slower = change.get("slower", 1.05)
    traffic = soak.Traffic(requests=9, errors=change.get("errors", []))
    traffic.gaps = [(float(s), 10.0 * (slower if s >= 50 else 1)) for s in range(60)]
    counted = {"full_steps": 5, "lora_steps": 15}
    memory, left = change.get("memory", [1000, 1019]), change.get("left", 0)
    metrics = soak.metrics_of(traffic, 60.0, memory, left, counted)
    assert soak.broken(metrics) == wanted
    assert metrics["p95_growth"] == round(slower - 1, 4)
    with pytest.raises(RuntimeError, match="nothing was tested"):
        soak.metrics_of(traffic, 60.0, memory, left, counted | {"lora_steps": 0})


def test_the_page_on_quality_says_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw", "draw_saving", "draw_kl_over_kv", "draw_accuracy"):
        monkeypatch.setattr(quality_tables, name, lambda *_: None)
    assert quality_tables.PAGE.read_text() == quality_tables.rendered_page()


def rollout(text: str, **changed: Any) -> Rollout:
    plain: dict[str, Any] = dict(tokens=4, cut_off=False, loops=False, logprob=-1.0)
    plain |= {f"distinct_{n}": 1.0 for n in (1, 2, 3)} | {"first_choice": 1.0}
    return Rollout(text, **(plain | changed))


def test_chat_measures_the_base_models_answers_and_gets_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base answers that loop or are empty are no replies; a limited run is not in the table."""
    base = [rollout("Yes.", cut_off=True), rollout("So so so", loops=True), rollout(" ")]
    ours = [rollout("No.", logprob=-2.5, loops=True), *base[1:]]
    replies: list[Any] = []

    def evaluate(model: str, adapter: Path, **given: Any) -> EvaluateResult:
        if "chat" in given:
            replies.append([json.loads(line) for line in given["chat"].read_text().splitlines()])
            steps = {"all": Divergence(9, 2.0, 1.0, 0.25, 0.75)}
            return EvaluateResult(model, chat=ChatResult("replies", 1, steps))
        asked = [{"role": "user", "content": "Well?"}]
        answers = [
            {"messages": asked, "base": vars(b), "lora_drop": vars(a)} for a, b in zip(ours, base)
        ]
        steps_taken, start = Pass(12, 0, 9, 3), Estimate(0.5, 0.4, 0.6)
        found = RolloutsResult(
            "p.txt", 3, 0, "", steps_taken, steps_taken, figures(ours, base), start, answers
        )
        return EvaluateResult(model, rollouts=found)

    exact = {"all": Divergence(9, 2.0, 1.0, 0.125, 0.75)}
    monkeypatch.setattr(chat, "evaluate", evaluate)
    monkeypatch.setattr(chat.exact_steps, "on_chat", lambda *_: exact)
    monkeypatch.setattr(chat, "model_name", str)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    command = ["chat.py", "model", "--adapter", "made/here"]
    for more in ([], ["--limit", "3"]):
        monkeypatch.setattr("sys.argv", [*command, *more])
        chat.main()
    reply = {"role": "assistant", "content": "Yes.", "cut": True}
    assert replies[0] == [{"messages": [{"role": "user", "content": "Well?"}, reply]}]
    (file,) = tmp_path.glob("*.jsonl")
    assert "answers" not in json.loads(file.read_text().splitlines()[0])["metrics"]["rollouts"]
    (found,) = quality_tables.chats()
    assert found["settings"]["adapter"] == "made/here" and found["settings"]["limit"] is None
    row = quality_tables.table([found], quality_tables.CHAT)[-1]
    assert row.startswith("| 0.250 | 0.125 | 75.0% | 4 (4) | 0.0% (33.3%) | -33.3 (")
    assert "| 66.7% (33.3%) | +33.3 (" in row and "-1.500 (-1.000)" in row


def test_what_drops_has_a_row_and_a_point_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whole layers and attentions count alike for the KV that a mix saves (Eq. 15, 30 layers)."""
    pytest.importorskip("matplotlib")
    found = dict(perplexity=2.0, base_perplexity=1.0, kl=0.5, agreement=0.5)

    def fake(whole: list[int], attention: list[int], **settings: Any) -> Any:
        lists = {"drop_layers": whole} | ({"drop_attention": attention} if attention else {})
        plain = quality_records.PLAIN | {"rho": 0.1, "k": 3} | settings
        steps = {kind: found for kind in ("all", "full", "lora")}
        return {"settings": plain, "metrics": steps | lists}

    numbers = {"layers": [9], "drop_attention": [10, 11]}
    records = [fake([9, 10, 11], []), fake([9, 10, 11], [], injection="attn")]
    records += [fake([9], [10, 11], **numbers), fake([9], [], k=2)]
    records += [fake([9, 12, 15], [], injection="attn", layers=[9, 12, 15], rho=None)]
    monkeypatch.setattr(quality_records.record, "newest", lambda *_: records)
    monkeypatch.setattr(quality_tables, "DOCS", tmp_path)
    rows = [line for line in quality_tables._what_drops() if line.endswith("| 7.5% |")]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| layers", "9–11", "–"],
        ["| attention", "9–11", "–"],
        ["| attention, by KL", "9, 12, 15", "–"],
        ["| mix, by KL", "9", "10–11"],
    ]
    assert (tmp_path / "quality_kv_kl.png").stat().st_size > 1000
    del records[1]
    assert quality_tables._what_drops() == []
