"""One optimizer step on A, B and g, on every device, and its settings."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_drop_vllm.decode.decoder import ForcedDecoder
from lora_drop_vllm.decode.trainable import Adapter
from lora_drop_vllm.training.checkpoint import Checkpoint
from lora_drop_vllm.training.mixture import MixedRows
from lora_drop_vllm.training.objective import DIVERGENCES, Losses, Weights, backward
from lora_drop_vllm.training.rows import Row, Rows, random_schedule, stack

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Plan:
    """The settings of the training loop.

    Attributes:
        steps: optimizer steps
        batch, accumulate: rows in a batch on each device, and batches in an optimizer step
        lr: highest learning rate
        warmup: steps of rising learning rate; then it falls along a cosine
        clip: largest norm of the gradient
        ce, kl, hidden: weights of the next-token cross-entropy, of KL(base || student) and of the
            distance of the hidden states
        rollouts: steps after which the adapter answers prompts of the corpus anew; 0 means never
        rollout_prompts: number of prompts that it answers each time
        on_policy: share of the tokens that come from its answers
        rollout_greedy: share of greedy answers among them; the others are sampled
        leave_loops: weight of predictions in loops that the base model might leave; see `Weights`
        save_every: steps between two checkpoints; a kill loses at most so many
        refresh_weight: weight of a refresh's prediction; a LoRA step's weighs 1
        divergence: what `kl` weighs: `forward`, `reverse` or `js`; see `Weights`
        bf16: compute in bfloat16; adapter, optimizer and residual stream stay in fp32. None means
            yes if the processor has instructions for it
        checkpointing: recompute layers in the backward pass, to save memory
        attention: `sdpa`, `matmul`, `flex` or `xformers`; None means `matmul` on CPUs in bfloat16,
            else `sdpa`
    """

    steps: int = 500
    batch: int = 4
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 20
    clip: float = 1.0
    ce: float = 1.0
    kl: float = 1.0
    hidden: float = 0.0
    refresh_weight: float = 1.0
    divergence: str = "forward"
    rollouts: int = 0
    rollout_prompts: int = 64
    on_policy: float = 0.5
    rollout_greedy: float = 0.5
    leave_loops: float = 0.0
    save_every: int = 50
    bf16: bool | None = None
    checkpointing: bool = False
    attention: str | None = None

    def check(self) -> None:
        """Raises ValueError for a value out of range; the error names the flag."""
        least = {"steps": 1, "batch": 1, "accumulate": 1, "save_every": 1, "warmup": 0}
        least |= {"ce": 0, "kl": 0, "hidden": 0, "refresh_weight": 0}
        least |= {"rollouts": 0, "rollout_prompts": 1, "leave_loops": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected {bound} or more"
                )
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: expected more than 0")
        if not 0 < self.on_policy < 1:
            raise ValueError(f"--on-policy {self.on_policy}: expected a share between 0 and 1")
        if not 0 <= self.rollout_greedy <= 1:
            raise ValueError(f"--rollout-greedy {self.rollout_greedy}: expected a share, 0 to 1")
        if self.divergence not in DIVERGENCES:
            allowed = ", ".join(DIVERGENCES)
            raise ValueError(f"--divergence {self.divergence}: expected one of {allowed}")
        if self.leave_loops and self.divergence == "reverse":
            raise ValueError(
                f"--leave-loops {self.leave_loops} with --divergence reverse: infinite where a "
                "token must not come; choose forward or js"
            )
        if self.leave_loops and not self.rollouts:
            raise ValueError(
                f"--leave-loops {self.leave_loops} without --rollouts: only the adapter's own "
                "answers have loops to leave; give --rollouts 80, or leave it out"
            )
        if self.leave_loops and not self.kl:
            raise ValueError(
                f"--leave-loops {self.leave_loops} with --kl 0: it changes the base model's "
                "distribution, which --kl weighs; give --kl 1, or leave it out"
            )
        if not self.ce + self.kl + self.hidden > 0:
            raise ValueError("--ce, --kl, --hidden: all 0; give one of them some weight")

    def on_this_machine(self, run: Mapping[str, Any]) -> Plan:
        """The plan with every None replaced.

        Args:
            run: settings of the resumed run, which keep their values; empty for a new run
        """
        cuda, able = torch.cuda.is_available(), torch.cpu.get_capabilities()
        bf16, attention = self.bf16, self.attention
        if bf16 is None:
            fast = not cuda and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
            bf16 = run.get("bf16", fast)
        if attention is None:
            attention = run.get("attention", "matmul" if bf16 and not cuda else "sdpa")
        return replace(self, bf16=bf16, attention=attention)

    @property
    def weights(self) -> Weights:
        """The weights of the losses."""
        losses = self.ce, self.kl, self.hidden
        return Weights(*losses, self.refresh_weight, self.divergence, self.leave_loops)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * (1 + math.cos(math.pi * share)) / 2


class Devices:
    """The processes that train together: those of `accelerate launch` or `torchrun`, or just one.

    Raises:
        ValueError: there are several processes, but accelerate is missing.
    """

    def __init__(self) -> None:
        self.number, self.count = 0, 1
        self._accelerator: Any = None
        if importlib.util.find_spec("accelerate") is not None:
            from accelerate import Accelerator

            # without cpu=True, accelerate treats each process as a run of its own
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self.number = self._accelerator.process_index
            self.count = self._accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.count:
            raise ValueError(
                f"started as {started} processes, of which {self.count} would train together; "
                "pip install 'lora_drop_vllm[train]', or start one process"
            )

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.count == 1:
            return x
        reduced: Tensor = self._accelerator.reduce(x, "mean")
        return reduced


class Trainer:
    """One run: its adapter, optimizer and position in the corpus.

    Args:
        rows: the corpus from the checkpoint's position on
        checkpoint: the state to start from; a run's first checkpoint has no optimizer state
    """

    def __init__(
        self,
        model: Any,
        rows: Rows | MixedRows,
        plan: Plan,
        seed: int,
        checkpoint: Checkpoint,
        devices: Devices,
    ) -> None:
        config = checkpoint.config
        if plan.bf16:
            _halve_weights(model)
        self.adapter = Adapter(config, checkpoint.adapter).to(model.device)
        self.decoder = ForcedDecoder(
            model,
            self.adapter,
            attention=plan.attention or "sdpa",
            checkpoint=plan.checkpointing,
        )
        self.rows, self.plan, self.seed, self.devices = rows, plan, seed, devices
        self.step, self.run = checkpoint.step, checkpoint.run
        self._parameters = self.adapter.tensors()
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()), lr=plan.lr, betas=BETAS, weight_decay=0.0
        )
        if self.step:
            for name, parameter in self._parameters.items():
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{
                        key: checkpoint.tensors[f"{key}/{name}"].to(model.device)
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }

    def checkpoint(self) -> Checkpoint:
        """The state of the run."""
        tensors = dict(self._parameters)
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                if key != "step":
                    tensors[f"{key}/{name}"] = value
        return Checkpoint(self.adapter.config, self.run, self.step, self.rows.position, tensors)

    def advance(self) -> dict[str, float]:
        """Takes one optimizer step; returns the log's entry.

        Raises:
            ValueError: the loss or the gradient is not finite; the adapter is unchanged.
        """
        plan, device = self.plan, self.decoder.model.device
        self._optimizer.zero_grad()
        losses = torch.zeros(8, dtype=torch.float64, device=device)
        count = 0
        for part in range(plan.accumulate * self.devices.count):
            chosen = [next(self.rows) for _ in range(plan.batch)]
            if part % self.devices.count != self.devices.number:
                continue
            count += sum(len(row.tokens) for row in chosen)
            number = self.step * plan.accumulate * self.devices.count + part
            losses += self._backward(chosen, number).values / plan.accumulate
        entry = Losses(self.devices.mean(losses)).named(plan.weights)
        gradient = [p.grad for p in self._parameters.values() if p.grad is not None]
        for own in gradient:
            own.copy_(self.devices.mean(own))
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), plan.clip)
        if not (math.isfinite(entry["loss"]) and math.isfinite(float(norm))):
            raise ValueError(
                f"step {self.step + 1}: the loss is {entry['loss']} and its gradient's norm "
                f"{float(norm)}; lower --lr {plan.lr} or raise --warmup {plan.warmup}; --from with "
                "this run's --out starts from its last checkpoint"
            )
        rate = plan.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.step += 1
        return (
            {"step": self.step}
            | entry
            | {"lr": rate, "norm": float(norm), "tokens": count * self.devices.count}
        )

    def _backward(self, chosen: Sequence[Row], number: int) -> Losses:
        plan, device = self.plan, self.decoder.model.device
        tokens, sequence = (x.to(device) for x in stack(chosen, self.rows.length))
        schedule = random_schedule(sequence, chosen, self.adapter.config.k, self.seed, number)
        own = torch.tensor([row.own for row in chosen], device=device)
        share = 1 / plan.accumulate
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(plan.bf16)):
            return backward(self.decoder, tokens, schedule, own, plan.weights, share)


def _halve_weights(model: Any) -> None:
    """Keeps the frozen linear layers in bfloat16; autocast then need not cast them each time."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.bfloat16(), requires_grad=False)
