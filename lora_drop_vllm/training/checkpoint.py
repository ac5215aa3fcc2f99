"""The state of a training run: one file, replaced as a whole, and a log that agrees with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_drop_vllm.atomic_files import append_line, replacing
from lora_drop_vllm.method.adapter import AdapterConfig, BaseModel
from lora_drop_vllm.training.mixture import MixedPosition, read_position
from lora_drop_vllm.training.rows import Position

FILE = "training.safetensors"
LOG = "training.jsonl"
# settings of runs from before these could be set
BEFORE = {"drop_attention": [], "rollout_greedy": 0.5, "leave_loops": 0.0}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps.

    Attributes:
        config: the adapter's config
        run: the settings of the run
        position: the position in the corpus
        tensors: the adapter's tensors, and AdamW's as `exp_avg/…` and `exp_avg_sq/…`
    """

    config: AdapterConfig
    run: dict[str, Any]
    step: int
    position: Position | MixedPosition
    tensors: dict[str, Tensor]

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors."""
        return {name: tensor for name, tensor in self.tensors.items() if "/" not in name}

    def save(self, folder: Path) -> None:
        """Replaces the folder's checkpoint; a kill leaves the old one or the new one."""
        state = {
            "config": asdict(self.config),
            "run": self.run,
            "step": self.step,
            "position": self.position,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        with replacing(folder / FILE) as scratch:
            save_file(tensors, scratch, metadata={"state": json.dumps(state)})

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """The folder's checkpoint, if it has one.

        Raises:
            ValueError: the file is not a checkpoint.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            base = BaseModel(**state["config"].pop("base_model"))
            config = AdapterConfig(base_model=base, **state["config"])
            for name, value in BEFORE.items():
                state["run"].setdefault(name, value)
            position = read_position(state["position"])
            return cls(config, state["run"], state["step"], position, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a checkpoint of `lora-drop train` ({error}); delete it, or choose "
                "another --out"
            ) from error

    def check_run(self, run: Mapping[str, Any], folder: Path) -> None:
        """Raises ValueError if the run in the folder has other settings."""
        for name, value in run.items():
            if name == "model_digest":
                if self.run.get(name, value) != value:  # older runs have none
                    raise ValueError(
                        f"--out {folder}: holds a run of another model that is called "
                        f"{run['model']} too; resume it with that model, or choose another --out"
                    )
            elif (other := self.run.get(name)) != value:
                raise ValueError(
                    f"--out {folder}: holds a run with --{name.replace('_', '-')} {other}, not "
                    f"{value}; resume it with that value, or choose another --out"
                )


def read_log(folder: Path, steps: int) -> list[dict[str, float]]:
    """The log's entries for the first `steps` steps, without a line that a kill cut."""
    path, entries = folder / LOG, []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= steps:
            entries.append(entry)
    return entries


def write_log(folder: Path, entries: list[dict[str, float]]) -> None:
    """Replaces the log."""
    with replacing(folder / LOG) as scratch:
        scratch.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def append_log(folder: Path, entry: dict[str, float]) -> None:
    """Appends one step's entry to the log."""
    append_line(folder / LOG, json.dumps(entry))
