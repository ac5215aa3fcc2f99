"""`lora-drop train`: A, B and g by gradients through the parallel decode (Sec. II-E, III-A).

A run depends on its settings only. Rows, prompts and phases follow from the seed and the batch's
number. A killed run therefore resumes from its checkpoint, and the resulting adapter is identical.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_drop_vllm.atomic_files import check_folder
from lora_drop_vllm.decode.decoder import base_model
from lora_drop_vllm.decode.pretrained import model_digest, model_name, open_model
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import (
    AdapterConfig,
    load_tensors,
    read_config,
    save_adapter,
)
from lora_drop_vllm.model_card import write_card
from lora_drop_vllm.plots import plot_training, require_matplotlib
from lora_drop_vllm.training.checkpoint import Checkpoint, append_log, read_log, write_log
from lora_drop_vllm.training.corpus import Corpus, read_corpus, remark
from lora_drop_vllm.training.fit import new_config
from lora_drop_vllm.training.gradient import Devices, Plan, Trainer
from lora_drop_vllm.training.layerwise import fit_tensors
from lora_drop_vllm.training.mixture import MixedRows, rows_of
from lora_drop_vllm.training.rollouts import Rollouts, forget_rollouts
from lora_drop_vllm.training.rows import Position, Rows
from lora_drop_vllm.training.samples import sample
from lora_drop_vllm.training.settings import DTYPES, Settings


@dataclass(frozen=True)
class TrainResult:
    """An adapter that `train` made.

    Attributes:
        folder: the adapter's folder, which also holds the log and the last checkpoint
        config: contents of its `adapter_config.json`
        steps: optimizer steps taken, including those of earlier runs into the folder
        log: one entry per step: losses per token, learning rate, tokens per second
        skipped: number of lines, rows or replies of the corpus that could not be used
    """

    folder: Path
    config: AdapterConfig
    steps: int
    log: list[dict[str, float]]
    skipped: int

    def __str__(self) -> str:
        made = f"{self.folder}: {self.config.dropped}, {self.steps} steps"
        if losses := [entry["loss"] for entry in self.log]:
            made += f", loss {losses[0]:.3f} at the first and {losses[-1]:.3f} at the last"
        return made + remark(self.skipped)


def train(
    model: str | Path,
    corpus: Sequence[str | Path],
    settings: Settings,
    plan: Plan,
    out: str | Path,
    *,
    start: str = "fit",
    profile: str | Path | None = None,
    plots: bool = False,
) -> TrainResult:
    """Trains an adapter by gradients, or resumes the run whose checkpoint is in `out`.

    Args:
        model: folder, or a name in the local Hugging Face cache
        corpus: as for `fit`
        settings: which layers drop, k, rank and the length of a row
        plan: steps, batch, learning rate and the weights of the losses
        out: folder of the adapter, its log and its checkpoint; made if it is not there
        start: `fit`, `zero` (B = 0, g = 1), or an adapter's folder or name on the hub
        profile: a `profile.json` that scores the layers
        plots: draw `training.png` into `out` (needs matplotlib)

    Raises:
        ValueError: settings, a corpus or a folder that cannot be used; a loss that is not finite.
        RuntimeError: the adapter, the log or the checkpoint could not be written.
    """
    model, out = str(model), Path(out)
    _check(plan, out, plots)
    texts = read_corpus(corpus, model)
    checkpoint = Checkpoint.load(out)
    plan = plan.on_this_machine(checkpoint.run if checkpoint else {})
    run = _described(settings, plan, start, model, texts)
    if checkpoint:
        checkpoint.check_run(run, out)
    devices = Devices()
    base, tokenizer = open_model(model)
    rollouts = Rollouts(model, tokenizer, texts, settings, plan, out) if plan.rollouts else None
    texts = texts.rendered(tokenizer, settings.length)
    if not checkpoint:
        forget_rollouts(out)
        config, tensors = begin(model, base, tokenizer, texts, settings, start, profile)
        checkpoint = Checkpoint(config, run, 0, Position(), tensors)
    rows = _rows(texts, tokenizer, settings, checkpoint, rollouts)
    trainer = Trainer(base, rows, plan, settings.seed, checkpoint, devices)
    log = run_to_the_end(trainer, out, DTYPES[settings.dtype], rollouts)
    if plots and not devices.number:
        plot_training(log, out / "training.png")
    return TrainResult(out, trainer.adapter.config, trainer.step, log, texts.skipped)


def _check(plan: Plan, out: Path, plots: bool) -> None:
    plan.check()
    check_folder("--out", out)
    if plots:
        require_matplotlib()


def _described(
    settings: Settings, plan: Plan, start: str, model: str, corpus: Corpus
) -> dict[str, Any]:
    """The settings of a run, in the form that its checkpoint keeps."""
    run = asdict(settings) | asdict(plan) | {"from": start, "corpus": corpus.origin}
    run |= {"model": model_name(model), "model_digest": model_digest(model)}
    described: dict[str, Any] = json.loads(json.dumps(run))
    return described


def _rows(
    texts: Corpus,
    tokenizer: Any,
    settings: Settings,
    checkpoint: Checkpoint,
    rollouts: Rollouts | None,
) -> Rows | MixedRows:
    """The rows from the checkpoint on."""
    step, position = checkpoint.step, checkpoint.position
    if rollouts:
        return rollouts.rows(step, position, checkpoint.config, checkpoint.adapter)
    return rows_of(texts, tokenizer, settings.length, settings.seed, position)


def run_to_the_end(
    trainer: Trainer, out: Path, dtype: torch.dtype, rollouts: Rollouts | None = None
) -> list[dict[str, float]]:
    """Takes the remaining steps, with a log and checkpoints in `out`; returns the log."""
    plan, writes = trainer.plan, trainer.devices.number == 0
    out.mkdir(parents=True, exist_ok=True)
    begun = trainer.step
    log = read_log(out, trainer.step)
    if writes:
        write_log(out, log)
    with tqdm(
        total=plan.steps, initial=trainer.step, desc="Training", unit="step", disable=not writes
    ) as progress:
        while trainer.step < plan.steps:
            if rollouts and rollouts.due(trainer.step) and trainer.step > begun:
                adapter = trainer.adapter.config, trainer.adapter.tensors()
                trainer.rows = rollouts.rows(trainer.step, trainer.rows.position, *adapter)
            began = time.monotonic()
            entry = trainer.advance()
            entry["tokens_per_s"] = round(entry["tokens"] / (time.monotonic() - began), 1)
            log.append(entry)
            progress.set_postfix(loss=f"{entry['loss']:.3f}", tokens_per_s=entry["tokens_per_s"])
            progress.update()
            if writes:
                append_log(out, entry)
                if trainer.step % plan.save_every == 0 or trainer.step == plan.steps:
                    _save(trainer, out, dtype)
                    trainer.checkpoint().save(out)  # last, after the files it vouches for
    if begun == plan.steps and writes:
        _save(trainer, out, dtype)  # another command may have written there since
    return log


def _save(trainer: Trainer, out: Path, dtype: torch.dtype) -> None:
    config = trainer.adapter.config
    save_adapter(out, config, trainer.adapter.tensors(), dtype)
    write_card(out, config, f"Made by `lora-drop train`, {trainer.step} steps.")


def begin(
    model: str,
    base: Any,
    tokenizer: Any,
    corpus: Corpus,
    settings: Settings,
    start: str,
    profile: str | Path | None,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter that training starts from.

    Raises:
        ValueError: the settings, the profile or the adapter cannot be used.
    """
    if start not in ("fit", "zero"):
        try:
            folder = adapter_folder(start)
            config = read_config(folder)
        except ValueError as error:
            raise ValueError(
                f"--from {start}: expected fit, zero or an adapter ({error})"
            ) from error
        if profile:
            raise ValueError(f"--profile {profile}: --from {start} has its layers; leave it out")
        settings.check_agrees(config, start)
        return config, load_tensors(folder, config)
    settings.check(base_model(base))
    samples = sample(base, tokenizer, corpus, settings)
    config = new_config(model, base, settings, samples, profile)
    if start == "fit":
        return config, fit_tensors(base, samples, config)
    return config, config.sites.start(torch.Generator().manual_seed(settings.seed))
