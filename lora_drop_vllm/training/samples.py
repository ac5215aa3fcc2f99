"""A corpus in batches under random prompts and phases of the served schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_drop_vllm.decode.decoder import TOKENS_AT_ONCE, Batch
from lora_drop_vllm.decode.masks import use_backend
from lora_drop_vllm.decode.positions import Schedule
from lora_drop_vllm.training.corpus import Corpus
from lora_drop_vllm.training.mixture import rows_of
from lora_drop_vllm.training.rows import Row, random_schedule, stack
from lora_drop_vllm.training.settings import Settings

HELD_OUT = 8  # every eighth batch is held out, from the second
STREAMS = 8  # upper bound of the streams [tokens, d] that `fit` or `profile` holds at once


@dataclass(frozen=True)
class Sample:
    """A batch of token ids [N, T], its schedule, and the `Batch` for the layers."""

    tokens: Tensor
    schedule: Schedule
    batch: Batch

    @property
    def count(self) -> int:
        """Number of tokens without padding."""
        return int((self.schedule.sequence >= 0).sum())


def sample(model: Any, tokenizer: Any, corpus: Corpus, settings: Settings) -> list[Sample]:
    """The corpus, or `settings.tokens` of it, in batches under random schedules.

    In a large corpus, each row begins with another passage, and the sources alternate. The tokens
    then come from as many texts, of as many kinds, as possible.

    Raises:
        ValueError: there is too little text for the rank, or too much for the memory.
    """
    use_backend(model, "sdpa")
    length = settings.length
    wanted = settings.tokens // length
    _check_memory(model, wanted * length)
    chosen = _rows(corpus, tokenizer, settings, wanted, spread=True)
    if len(chosen) < wanted:
        chosen = _rows(corpus, tokenizer, settings, wanted, spread=False)
    size = max(1, min(TOKENS_AT_ONCE // length, len(chosen) // HELD_OUT))
    samples = []
    for number, start in enumerate(range(0, len(chosen), size)):
        part = chosen[start:][:size]
        tokens, sequence = (x.to(model.device) for x in stack(part, length))
        schedule = random_schedule(sequence, part, settings.k, settings.seed, number)
        samples.append(Sample(tokens, schedule, Batch.of(model, schedule, settings.kv)))
    found = sum(len(s.batch.layout.lora_at) for s in samples)
    if len(samples) < 2 or found < settings.rank:
        raise ValueError(
            f"--rank {settings.rank}: expected two rows of --length {length} with that many LoRA "
            f"positions or more, but there are {len(chosen)} with {found}; give more text or "
            "--tokens, or lower the two"
        )
    return samples


def _rows(
    corpus: Corpus, tokenizer: Any, settings: Settings, wanted: int, spread: bool
) -> list[Row]:
    """That many rows, or all rows; with `spread`, at most one row begins in a passage."""
    rows = rows_of(corpus, tokenizer, settings.length, settings.seed, turns=True)
    chosen: list[Row] = []
    while len(chosen) < wanted and not rows.position.epoch:
        chosen.append(next(rows))
        if spread:
            rows.leave_passage()
    return chosen


def _check_memory(model: Any, tokens: int) -> None:
    need = STREAMS * tokens * model.config.hidden_size * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    if need > free:
        raise ValueError(
            f"--tokens {tokens}: their streams take {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB "
            f"are free; lower --tokens to {int(tokens * free / need)} or fewer"
        )
