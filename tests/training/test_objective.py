"""The training loss, its gradient, and loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import load_model, make_adapter
from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Schedule, rows
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.engine.offline_generation import LOOP
from lora_drop_vllm.evaluation.rollout_report import loop_start
from lora_drop_vllm.training.objective import (
    LEAVE,
    OUT,
    Weights,
    backward,
    leave,
    predicting,
    repeats,
)


def test_predictions_after_the_first_lora_step_count() -> None:
    schedule = Schedule.of(rows([9, 6]), torch.tensor([3, 2]), 2, torch.tensor([0, 2]))
    assert schedule.full.int().tolist() == [
        [1, 1, 1, 0, 0, 1, 0, 0, 1],
        [1, 1, 1, 0, 0, 1, 0, 0, 0],
    ]
    assert predicting(schedule).tolist() == [3, 4, 5, 6, 7, 9 + 3, 9 + 4]


def phrases() -> Tensor:
    """In two rows positions 6 to 11 go on with a phrase; in the third a prompt has part of it."""
    tokens = torch.randint(3, 512, (3, 16))
    tokens[:2, 4:13] = torch.tensor([7, 8, 9] * 3)
    tokens[2, 1:10] = tokens[0, 4:13]
    return tokens


@pytest.mark.parametrize(
    "weights",
    [
        Weights(),
        Weights(0.3, 0.0, 2.0),
        Weights(0.0, 1.0, 0.0, 0.25),
        Weights(1.0, 0.5, 0.1, 0.0),
        Weights(0.2, 0.7, 0.0, 0.5, "reverse"),
        Weights(0.2, 0.7, 0.0, 0.5, "js"),
        Weights(0.2, 0.7, 0.0, 0.5, leave_loops=3.0),
        Weights(0.2, 0.7, 0.0, 0.5, "js", leave_loops=0.5),
    ],
    ids=["ce-kl", "hidden", "refresh", "lora-only", "reverse", "js", "loops", "loops-js"],
)
def test_the_gradient_by_the_formula_is_that_of_autograd(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Weights
) -> None:
    monkeypatch.setattr("lora_drop_vllm.training.objective.AT_ONCE", 5)
    adapter = Adapter(*make_adapter(tmp_path, models["llama"], drop_layers=[3, 5]))
    decoder = ForcedDecoder(load_model(models["llama"]), adapter)
    tokens, schedule = phrases(), Schedule.of(rows([16, 13, 11]), 3, 3)
    own = torch.tensor([True, False, True])
    monkeypatch.setitem(LOOP, "min_pattern_size", 3)
    likely = torch.zeros(512)
    likely[7:10] = 5.0  # else a loop's tokens would hardly matter
    plain = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: plain(hidden) + likely)
    losses = backward(decoder, tokens, schedule, own, weights, 0.5).named(weights)
    got = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    hidden, base = (x.flatten(0, 1) for x in decoder.hidden_and_base(tokens, schedule))
    at = predicting(schedule)
    lora = schedule.lora.flatten()[at]
    assert lora.any() and not lora.all()
    next_token = tokens.flatten()[at + 1]
    log_p, base_log_p = (decoder.logits(x[at]).log_softmax(-1) for x in (hidden, base))
    if weights.leave_loops:
        left = (at >= 6) & (at < 12)
        base_log_p = base_log_p.clone()
        base_log_p[left, next_token[left]] = OUT
        base_log_p = base_log_p.log_softmax(-1)
    ce = torch.nn.functional.nll_loss(log_p, next_token, reduction="none")
    ce = ce * ~own[at // tokens.shape[1]]  # only the base model judges what the adapter wrote
    kl = torch.nn.functional.kl_div(log_p, base_log_p, log_target=True, reduction="none").sum(-1)
    p, base_p = log_p.exp(), base_log_p.exp()
    log_mean = ((p + base_p) / 2).log()
    js = (p * (log_p - log_mean) + base_p * (base_log_p - log_mean)).sum(-1) / 2
    divergence = {"forward": kl, "reverse": (p * (log_p - base_log_p)).sum(-1), "js": js}
    trained = divergence[weights.divergence]
    if weights.leave_loops:
        trained = torch.where(left, weights.leave_loops * trained, trained)
    far = (hidden[at] - base[at]).square().mean(-1) / base[at].square().mean()
    weight = torch.where(lora, 1.0, weights.refresh)
    ce_mean, kl_mean, far_mean, trained_mean = (
        (weight * x).sum() / weight.sum() for x in (ce, kl, far, trained)
    )
    total = weights.ce * ce_mean + weights.kl * trained_mean + weights.hidden * far_mean
    expected = {"loss": total, "ce": ce_mean, "kl": kl_mean, "hidden": far_mean}
    if weights.divergence != "forward":
        expected[weights.divergence] = trained_mean
    expected |= {"kl_lora": kl[lora].mean(), "kl_refresh": kl[~lora].mean()}
    assert losses == {name: pytest.approx(x.item(), abs=1e-4) for name, x in expected.items()}
    want = torch.autograd.grad(0.5 * total, list(adapter.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=0)


def test_a_batch_without_predictions_trains_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = Adapter(*make_adapter(tmp_path, models["llama"], drop_layers=[3, 5]))
    decoder = ForcedDecoder(load_model(models["llama"]), adapter)
    schedule = Schedule.of(rows([8, 6]), torch.tensor([8, 5]), 3)
    own, weights = torch.tensor([True, True]), Weights(leave_loops=1.0)
    losses = backward(decoder, torch.randint(3, 512, (2, 8)), schedule, own, weights, 1.0)
    assert losses.named(Weights()) == {"loss": 0.0, "ce": 0.0, "kl": 0.0, "hidden": 0.0}
    assert all(p.grad is None for p in adapter.parameters())


def test_what_repeats_is_each_later_time_of_a_phrase() -> None:
    phrase = list(range(8))
    apart = [20, *phrase, 30, 31, *phrase, 32, *phrase, 33]
    twice = [20, *phrase, *phrase, *phrase[:7], 21]
    sequence = rows([len(apart), len(twice)])
    tokens = torch.zeros_like(sequence)
    tokens[0], tokens[1, : len(twice)] = torch.tensor(apart), torch.tensor(twice)
    found = repeats(tokens, sequence)
    assert found[0].nonzero().flatten().tolist() == [*range(11, 19), *range(20, 28)]
    assert not found[1].any()
    parted = torch.where(torch.arange(29) < 19, 0, 1)[None]
    assert not repeats(tokens[:1], parted).any()  # two sequences, neither has it three times
    same = tokens[:1].repeat(3, 1)[:, :12]
    assert not repeats(same, rows([12, 12, 12])).any()  # once in each of three rows
    assert not repeats(torch.zeros_like(tokens), torch.full_like(sequence, -1)).any()  # padding
    assert not repeats(tokens[:, :7], sequence[:, :7]).any()


def test_what_the_report_calls_a_loop_repeats() -> None:
    torch.manual_seed(0)
    loops = 0
    for _ in range(200):
        size, times = int(torch.randint(8, 140, ())), float(torch.rand(()) * 2 + 2)
        phrase = torch.randint(0, 50, (size,))
        told = phrase.repeat(4)[: int(size * times)]
        tokens = torch.cat((torch.randint(50, 60, (30,)), told, torch.randint(50, 60, (30,))))
        start = loop_start(tokens.tolist())
        found = repeats(tokens[None], rows([len(tokens)]))[0]
        if start is not None:
            loops += 1
            assert found[start + size : start + 3 * size].all()
        assert found.sum() <= max(len(told) - size, 0)
    assert 50 < loops < 150


def test_a_loop_is_left_only_where_the_base_model_might() -> None:
    sure, unsure = 1 - LEAVE / 2, 1 - LEAVE * 2
    p = torch.tensor([[sure, 1 - sure, 0.0], [unsure, 1 - unsure, 0.0], [unsure, 1 - unsure, 0.0]])
    z = p.log()
    left = leave(z, torch.tensor([0, 0, 0]), torch.tensor([True, True, False]))
    assert left.tolist() == [False, True, False]
    torch.testing.assert_close(z.softmax(-1), torch.stack((p[0], torch.tensor([0.0, 1, 0]), p[2])))
