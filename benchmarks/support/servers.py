"""Servers that are measured over HTTP: their model and their arguments of vLLM."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.cli.demo import BUNDLED_ADAPTER
from lora_drop_vllm.cli.gguf_model import real_model
from lora_drop_vllm.config import LoRADropConfig, resolve
from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.server_process import Server
from support import gpu_memory
from support.engines import SHAPES, make_shape

DEMO = "demo"  # --model: the quick start's model with its adapter
START_SECONDS = 1800  # a large model that compiles both kinds of step
KV_SLACK = 512  # tokens a request may hold beyond its own: a block of slack in each group of layers


@dataclass(frozen=True)
class Subject:
    """The model under measurement.

    Attributes:
        name: name in the tables
        folder: folder with its config and tokenizer
        dummy: whether its weights are made up
        adapter: folder, or None for `untrained`
    """

    name: str
    folder: Path
    dummy: bool
    adapter: str | None

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        raw: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return raw

    @property
    def num_layers(self) -> int:
        """n."""
        return int(self.config["num_hidden_layers"])

    @property
    def shape(self) -> BaseModel:
        """Type, depth and width, which an adapter must match."""
        return BaseModel.of(self.config)

    def settings(self, rho: float | None, k: int | None) -> dict[str, Any]:
        """The value of `lora_drop`; None leaves a setting to the adapter or the default."""
        given = {"rho": rho, "k": k}
        chosen = {name: value for name, value in given.items() if value is not None}
        return ({"adapter": self.adapter} if self.adapter else {"untrained": True}) | chosen

    def resolved(self, settings: dict[str, Any]) -> LoRADropConfig:
        """These settings with all defaults filled in."""
        return resolve(settings, self.shape)


def open_subject(model: str, adapter: str | None, scratch: Path) -> Subject:
    """The model that `--model` and `--adapter` name.

    Args:
        model: one of `SHAPES`, `demo`, or a folder
        adapter: folder
        scratch: folder in which a shape's folder is made

    Raises:
        ValueError: there is no such model.
    """
    if model == DEMO:
        folder = real_model()
        return Subject(folder.name, folder, False, adapter or str(BUNDLED_ADAPTER))
    if model in SHAPES:
        folder = make_shape(scratch / model, model)
        make_tokenizer(folder, SHAPES[model]["vocab_size"])
        return Subject(f"{model} shape", folder, True, adapter)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"--model {model}: no folder with a config.json; give one, or {DEMO}, or one of "
            f"{', '.join(SHAPES)}"
        )
    return Subject(Path(model).resolve().name, Path(model), False, adapter)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer for made-up weights: one word per token, so that text and ids agree."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


def lora_drop_flags(settings: dict[str, Any]) -> list[str]:
    """Arguments of vLLM that serve with these settings of LoRA-Drop."""
    value = json.dumps({"lora_drop": settings})
    return ["--model-impl", "lora_drop", "--additional-config", value]


def longest(given: argparse.Namespace) -> int:
    """Tokens of the longest request."""
    return int(max(given.context) + max(given.tokens, given.kv_tokens) + 64)


def num_size(given: argparse.Namespace) -> int:
    """Bytes of a number."""
    return 4 if given.dtype == "float32" else 2


def kv_pool(config: dict[str, Any], given: argparse.Namespace) -> int:
    """Bytes of every server's KV pool, for the longest and largest burst."""
    per_token = config["num_hidden_layers"] * gpu_memory.layer_token_bytes(config, num_size(given))
    return max((longest(given) + KV_SLACK) * max(given.concurrency) * per_token, 1 << 28)


def needs(config: dict[str, Any], given: argparse.Namespace) -> dict[str, int]:
    """GPU memory of each server in bytes: the model, and half of its layers for the ideal."""
    size, pool = num_size(given), kv_pool(config, given)
    half = config | {"num_hidden_layers": config["num_hidden_layers"] // 2}
    whole = gpu_memory.engine_bytes(config, size, pool)
    few = gpu_memory.engine_bytes(half, size, pool)
    return {"stock": whole, "lora_drop": whole, "fewer_layers": few}


def check_memory(subject: Subject, given: argparse.Namespace) -> None:
    """Refuse servers that the GPU cannot hold beside each other.

    Raises:
        ValueError: with what they need.
    """
    card = gpu_memory.card_bytes()
    how = card and gpu_memory.plan(list(needs(subject.config, given).values()), card, False)
    if how and how != "together":
        raise ValueError(
            f"--model {subject.name}: three servers at once are {how}; lower --concurrency or "
            "--context, or take a smaller model"
        )


def engine_flags(subject: Subject, given: argparse.Namespace) -> list[str]:
    """Arguments of vLLM that every variant has, sized for the longest and largest burst."""
    raw, length = subject.config, longest(given)
    flags = ["--max-model-len", str(length), "--max-num-seqs", str(max(given.concurrency))]
    flags += ["--dtype", given.dtype]
    flags += ["--kv-cache-memory-bytes", str(kv_pool(raw, given)), "--no-enable-prefix-caching"]
    if card := gpu_memory.card_bytes():
        share = gpu_memory.utilization(needs(raw, given)["stock"], card)
        flags += ["--gpu-memory-utilization", str(share)]
    if given.compile:
        sizes = json.dumps({"cudagraph_capture_sizes": sorted(given.concurrency)})
        flags += ["--no-enforce-eager", "--compilation-config", sizes]
    if subject.dummy:
        flags += ["--load-format", "dummy"]
    return flags


def fewer_layers_flags(subject: Subject) -> list[str]:
    """Arguments of vLLM for the same model with half of its layers, whose output means nothing."""
    half: dict[str, Any] = {"num_hidden_layers": subject.num_layers // 2}
    if kinds := subject.config.get("layer_types"):  # one entry per layer
        half["layer_types"] = kinds[: subject.num_layers // 2]
    return ["--load-format", "dummy", "--hf-overrides", json.dumps(half)]


def server(subject: Subject, given: argparse.Namespace, *flags: str) -> Server:
    """Server of the subject, not yet started."""
    arguments = [*engine_flags(subject, given), *flags]
    return Server(subject.folder, arguments, start_seconds=START_SECONDS)
