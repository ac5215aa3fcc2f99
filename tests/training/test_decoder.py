"""The decode of all positions at once, compared with the oracle's, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracle import Forced
from serving import settings_of
from tiny import FAMILIES, VARIANTS, VOCAB, make_adapter
from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.positions import Layout, Schedule, rows
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.method.adapter import AdapterError, load_tensors, read_config, save_adapter

DROP, LENGTHS = [3, 5], [16, 5, 13, 11]
PROMPT, K, PHASE = (torch.tensor(v) for v in ([4, 5, 3, 1], [3, 1, 7, 1000], [2, 0, 0, 5]))
COMBINATIONS = [
    pytest.param(reuse, kv, injection, id=f"{reuse}-{kv}-{injection}")
    for reuse in ("previous", "anchor", "update", "none")
    for kv in ("skip", "write")
    for injection in ("block", "attn_mlp", "attn", "mixed")
]


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape)


def oracle_logits(model: Any, config: Any, tensors: Any, tokens: Tensor, schedule: Any) -> Tensor:
    """Logits of the real positions, sequence after sequence."""
    forced = Forced(model, settings_of(config, tensors))
    parts = []
    for number in range(int(schedule.sequence.max()) + 1):
        own = schedule.sequence == number
        parts.append(forced.logits_of(tokens[own].tolist(), schedule.full[own].tolist()))
    return torch.cat(parts)


def own_positions(x: Tensor, schedule: Schedule) -> Tensor:
    """The same positions from [N, T, ...]."""
    order = schedule.sequence.flatten().argsort(stable=True)
    return x.flatten(0, 1)[order[schedule.sequence.flatten()[order] >= 0]]


def test_schedule_is_the_served_one() -> None:
    schedule = Schedule.of(rows([12, 8, 4]), torch.tensor([4, 2, 4]), 2, torch.tensor([0, 1, 2]))
    assert schedule.full.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert (schedule.lora | schedule.full).sum(1).tolist() == [12, 8, 4]
    layout = Layout.of(schedule)
    assert layout.full_at.tolist()[1] == [12, 13, 15, 18, 12, 12]
    assert layout.slots.tolist() == [3, 3, 4, 4, 5, 5, 7, 8, 8, 9]


def test_schedule_of_packed_rows_starts_over_in_each_sequence() -> None:
    sequence = torch.tensor([[0, 0, 0, 0, 2, 2, 2, -1], [1, 1, 1, 1, 1, -1, -1, -1]])
    schedule = Schedule.of(sequence, torch.tensor([1, 3, 2]), torch.tensor([1, 0, 9]))
    assert schedule.position.tolist()[0][:7] == [0, 1, 2, 3, 0, 1, 2]
    assert schedule.full.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=0, k=3), "prompt=0 of sequence 0: expected at least 1"),
        (
            dict(prompt=torch.tensor([4, 7]), k=3),
            "prompt=7 of sequence 1: expected at most its length",
        ),
        (dict(prompt=2, k=-1), "k=-1 of sequence 0"),
        (dict(prompt=2, k=3, phase=4), "phase=4 of sequence 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.of(rows([9, 6]), **arguments)


def test_a_sequence_in_two_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence=\[0, 1, 0\]"):
        Schedule.of(torch.tensor([[0, 0, 1, 1, 0]]), 1, 3)


RARE = pytest.mark.matrix
SETTINGS = [
    pytest.param(family, *c.values, id=f"{family}-{c.id}", marks=() if n in often else RARE)
    for family in VARIANTS
    for often in [range(16) if family in ("llama", "qwen2") else (0, 3, 8)]
    for n, c in enumerate(COMBINATIONS if family in FAMILIES else COMBINATIONS[:1])
]


@pytest.mark.parametrize(("family", "reuse", "kv", "injection"), SETTINGS)
def test_logits_are_the_oracles(
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    family: str,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    """The rows have four prompts, phases and k; one k passes the end, one row is all prompt."""
    model = hf_models[family]
    config, tensors = make_adapter(
        tmp_path, models[family], drop_layers=DROP, reuse=reuse, kv=kv, injection=injection
    )
    decoder = ForcedDecoder(model, Adapter(config, tensors))
    tokens = random_tokens(4, max(LENGTHS))
    schedule = Schedule.of(rows(LENGTHS), PROMPT, K, PHASE)
    with torch.no_grad():
        want = oracle_logits(model, config, tensors, tokens, schedule)
        got = own_positions(decoder.logits(decoder.hidden(tokens, schedule)), schedule)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize("kv", ["skip", "write"])
def test_packed_sequences_do_not_see_each_other(
    models: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path, kv: str
) -> None:
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=DROP, kv=kv)
    decoder = ForcedDecoder(hf_models["llama"], Adapter(config, tensors))
    apart = Schedule.of(rows(LENGTHS), PROMPT, K, PHASE)
    tokens = random_tokens(4, max(LENGTHS))
    packed = Schedule.of(
        torch.tensor([[0] * 16 + [2] * 13, [3] * 11 + [1] * 5 + [-1] * 13]), PROMPT, K, PHASE
    )
    together = torch.zeros_like(packed.sequence)
    for number, length in enumerate(LENGTHS):
        together[packed.sequence == number] = tokens[number, :length]
    with torch.no_grad():
        want = own_positions(decoder.hidden(tokens, apart), apart)
        got = own_positions(decoder.hidden(together, packed), packed)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("reuse", "kv", "injection"), COMBINATIONS)
def test_the_student_beside_the_base_model_is_the_student_alone(
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    """Values and gradients agree in packed rows; one sequence and one row are all prompt."""
    config, tensors = make_adapter(
        tmp_path, models["qwen2"], drop_layers=DROP, reuse=reuse, kv=kv, injection=injection
    )
    adapter = Adapter(config, tensors)
    sequence = torch.tensor(
        [[0] * 16 + [2] * 13, [3] * 11 + [1] * 5 + [-1] * 13, [4] * 20 + [-1] * 9]
    )
    given = ((PROMPT, 20), (K, 3), (PHASE, 0))
    schedule = Schedule.of(sequence, *(torch.tensor([*x, y]) for x, y in given))
    tokens, weight = random_tokens(*sequence.shape), torch.randn(65, 128)
    found = []
    for checkpoint in (False, True):
        decoder = ForcedDecoder(hf_models["qwen2"], adapter, checkpoint=checkpoint)
        alone = decoder.hidden(tokens, schedule)
        for x in (alone, decoder.hidden_and_base(tokens, schedule)[0]):
            x = own_positions(x, schedule)
            gradient = torch.autograd.grad((x * weight).sum(), list(adapter.parameters()))
            found.append((x, *gradient))
    for values in found[1:]:
        for a, b in zip(values, found[0], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5 * b.abs().max().item(), rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("matmul", "cpu"),
        ("flex", "cpu"),
        pytest.param("flex", "cuda", marks=pytest.mark.gpu),
        pytest.param("xformers", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("kv", ["skip", "write"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_every_attention_backend_gives_the_same(
    models: dict[str, Path], tmp_path: Path, backend: str, device: str, kv: str, packed: bool
) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
    config, tensors = make_adapter(tmp_path, models["qwen2"], drop_layers=DROP, kv=kv)
    model, adapter = tiny.load_model(models["qwen2"]).to(device), Adapter(config, tensors)
    adapter.to(device)
    sequence = torch.tensor([[0] * 9 + [1] * 7, [2] * 12 + [-1] * 4]) if packed else rows([16, 9])
    schedule = Schedule.of(sequence.to(device), 2, 3)
    tokens = random_tokens(*sequence.shape).to(device)
    with torch.no_grad():
        want, got = (
            ForcedDecoder(model, adapter, attention=name).hidden(tokens, schedule)
            for name in ("sdpa", backend)
        )
    torch.testing.assert_close(
        own_positions(got, schedule), own_positions(want, schedule), atol=1e-3, rtol=1e-4
    )


def test_flex_attention_on_the_cpu_refuses_to_train(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = Adapter(*make_adapter(tmp_path, models["llama"], drop_layers=DROP))
    decoder = ForcedDecoder(tiny.load_model(models["llama"]), adapter, attention="flex")
    with pytest.raises(ValueError, match="attention='flex': has no backward on the CPU"):
        decoder.hidden(random_tokens(1, 8), Schedule.of(rows([8]), 2, 3))


@pytest.mark.parametrize(
    ("reuse", "kv", "injection"), [c for c in COMBINATIONS if c.values[0] in ("previous", "update")]
)
def test_gradients_are_the_oracles(
    models: dict[str, Path],
    hf_models: dict[str, Any],
    tmp_path: Path,
    reuse: str,
    kv: str,
    injection: str,
) -> None:
    """A, B and gate get gradients, with and without checkpointing; the base gets none."""
    model = hf_models["llama"]
    config, tensors = make_adapter(
        tmp_path, models["llama"], drop_layers=DROP, reuse=reuse, kv=kv, injection=injection
    )
    adapter = Adapter(config, tensors)
    schedule = Schedule.of(rows([12, 7]), torch.tensor([3, 1]), 3)
    tokens, weights = random_tokens(2, 12), torch.randn(19, VOCAB)

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = (logits.log_softmax(-1) * weights).mean()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    want = gradients(oracle_logits(model, config, adapter.tensors(), tokens, schedule))
    for checkpoint in (False, True):
        decoder = ForcedDecoder(model, adapter, checkpoint=checkpoint)
        got = gradients(own_positions(decoder.logits(decoder.hidden(tokens, schedule)), schedule))
        for name, a, b in zip(adapter.tensors(), got, want):
            assert b.abs().max() > 0, name
            torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_base_beside_it_is_the_hugging_face_model(
    models: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path
) -> None:
    model = hf_models["llama"]
    decoder = ForcedDecoder(
        model, Adapter(*make_adapter(tmp_path, models["llama"], drop_layers=DROP))
    )
    tokens = random_tokens(2, 14)
    dropped, base = decoder.hidden_and_base(tokens, Schedule.of(rows([14, 14]), 4, 3))
    torch.testing.assert_close(decoder.logits(base), model(tokens).logits, atol=1e-4, rtol=1e-5)
    assert dropped.requires_grad and not base.requires_grad
    full, base = decoder.hidden_and_base(tokens, Schedule.of(rows([14, 14]), 4, 0))
    torch.testing.assert_close(full, base, atol=1e-4, rtol=1e-5)


def test_an_adapter_survives_the_module(models: dict[str, Path], tmp_path: Path) -> None:
    config, tensors = make_adapter(tmp_path, models["llama"], drop_layers=DROP)
    adapter = Adapter(config, tensors)
    assert sum(p.numel() for p in adapter.parameters()) == sum(t.numel() for t in tensors.values())
    save_adapter(tmp_path / "again", config, adapter.tensors())
    again = load_tensors(tmp_path / "again", read_config(tmp_path / "again"))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with pytest.raises(AdapterError, match=r"missing tensor 'layers\.3\.gate'"):
        Adapter(config, {n: t for n, t in tensors.items() if n != "layers.3.gate"})


def test_what_does_not_fit_is_refused(
    models: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    adapter = Adapter(*make_adapter(tmp_path, models["llama"], drop_layers=DROP))
    model = hf_models["llama"]
    other = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        ForcedDecoder(other, adapter)
    with pytest.raises(ValueError, match="the model is qwen2"):
        ForcedDecoder(hf_models["qwen2"], adapter)
    with pytest.raises(ValueError, match="attention='magic'"):
        ForcedDecoder(model, adapter, attention="magic")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"attention='xformers'.*use attention='sdpa'"):
            ForcedDecoder(model, adapter, attention="xformers")
    with pytest.raises(ValueError, match=r"tokens of shape \[1, 5\]"):
        ForcedDecoder(model, adapter).hidden(random_tokens(1, 5), Schedule.of(rows([6]), 2, 3))
