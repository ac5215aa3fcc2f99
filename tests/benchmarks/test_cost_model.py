"""The cost model: what a step reads and computes, and constants from measured steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engines import SHAPES
from support.gpu_memory import weight_bytes
from support.load.cost_model import H100, Machine, Model, Step, fit, prompt_step

CONFIG = SHAPES["llama-3-8b"]
STOCK, OURS = (Model.of(CONFIG, 2, drop, 16) for drop in (0, 14))


def decode(rows: int, length: int, lora: bool = False) -> Step:
    return Step(rows, rows, rows * length, rows * length // 4, rows * length, rows * length, lora)


def test_a_decode_step_reads_the_weights_and_the_kv() -> None:
    _, rows, read, computed = STOCK.costs(decode(4, 1000))
    embeddings = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    weights = weight_bytes(CONFIG, 2) - embeddings  # only the rows of 4 tokens are read
    kv = 4 * 1000 * 32 * 4096  # requests, tokens, layers, bytes of a token in a layer
    assert rows == 4 and read == pytest.approx(weights + kv, rel=1e-3)
    assert computed == pytest.approx(4 * weights, rel=0.1)  # 2 operations a weight of 2 bytes
    assert H100.seconds(decode(1, 1), STOCK) == pytest.approx(4.5e-3, rel=0.05)


def test_a_lora_step_leaves_out_14_of_32_layers() -> None:
    full, lora = (OURS.costs(decode(4, 1000, lora)) for lora in (False, True))
    layers = full[2] - lora[2]
    short = 14 * 4 * 250 * 4096  # the drop layers' lists are a quarter as long
    low_rank = 14 * 2 * 16 * 4096 * 2
    assert layers == pytest.approx(14 * (2 * OURS.layer) + short - low_rank)
    assert lora[3] < 0.7 * full[3]
    stock = STOCK.costs(decode(4, 1000))
    assert full[2] < stock[2] and full[3] == stock[3]


@pytest.mark.parametrize("row_s", [2e-3, 0.0], ids=["each request costs", "none does"])
def test_known_constants_are_found_again(row_s: float) -> None:
    known = Machine("known", bandwidth=20e9, flops=100e9, step_s=5e-3, row_s=row_s)
    steps = [(STOCK, prompt_step(32))]
    steps += [
        (model, decode(n, 64, lora))
        for n in (1, 4, 16, 64)
        for model, lora in ((STOCK, False), (OURS, True))
    ]
    found = fit("known", [(m, s, known.seconds(s, m)) for m, s in steps])
    assert found.bandwidth == pytest.approx(known.bandwidth, rel=1e-3)
    assert found.flops == pytest.approx(known.flops, rel=1e-3)
    assert found.step_s == pytest.approx(known.step_s, rel=1e-2)
    assert found.row_s == pytest.approx(row_s, rel=1e-2, abs=1e-6)


def test_steps_that_tell_no_flops_are_refused() -> None:
    measured = [(STOCK, decode(n, 64), 1.0 / n) for n in (1, 2, 4)]
    with pytest.raises(ValueError, match="measure more batch sizes"):
        fit("machine", measured)


def test_constants_enter_once_each() -> None:
    step = decode(3, 100)
    base = H100.seconds(step, STOCK)
    assert replace(H100, step_s=1.0).seconds(step, STOCK) == pytest.approx(base + 1)
    assert replace(H100, row_s=1.0).seconds(step, STOCK) == pytest.approx(base + 3)
