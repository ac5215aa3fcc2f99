"""Variants that take turns: servers that start together, of which one is awake at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lora_drop_vllm.server_process import Server

SPIN_SECONDS = 1.1  # after its last step a worker of vLLM looks for work for a second


@dataclass(frozen=True)
class Variant:
    """One variant of those that take turns.

    Attributes:
        url: URL of its server
        name: the server's name of its model
        k: `lora_drop_k` of the requests; None for a server without LoRA-Drop
        group: process group of the server; None if it is not ours
    """

    url: str
    name: str
    k: int | None = None
    group: int | None = None

    @classmethod
    def at(cls, url: str) -> Variant:
        """A running server."""
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            return cls(url, str(json.load(answer)["data"][0]["id"]))

    @classmethod
    def of(cls, server: Server) -> Variant:
        """A server that we started, in a process group of its own."""
        assert server.process is not None
        return cls(server.url, server.name, group=server.process.pid)

    def bodies(self, prompts: list[list[int]], tokens: int, salt: str) -> list[dict[str, Any]]:
        """Requests of exactly `tokens` tokens; those of one salt share no prefix with others."""
        asked: dict[str, Any] = {
            "model": self.name,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
        }
        if self.k is not None:
            asked["vllm_xargs"] = {"lora_drop_k": self.k}
        return [asked | {"prompt": ids} for ids in prompts]


def started(servers: dict[str, Server], running: contextlib.ExitStack) -> dict[str, Variant]:
    """All variants, running; `running` stops them at its end.

    On a CPU they start at the same time, because a start keeps little more than one core busy. On a
    GPU they start one after the other, because each measures the free memory while it starts.
    """
    import torch

    new = [one for one in servers.values() if one.process is None]
    print(f"Starting {len(new)} times vllm serve", flush=True)
    for one in new:
        running.callback(one.stop)
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else len(new)) as pool:
        list(pool.map(Server.start, new))  # raises the error of a failed start
    return {name: Variant.of(one) for name, one in servers.items()}


@contextlib.contextmanager
def standing_still(variants: Iterable[Variant]) -> Iterator[None]:
    """Stops their servers, so that each block has the machine for itself (`awake`)."""
    groups = {v.group for v in variants if v.group is not None}
    try:
        for group in groups:
            _signal(group, signal.SIGSTOP)
        yield
    finally:
        for group in groups:
            _signal(group, signal.SIGCONT)


@contextlib.contextmanager
def awake(variant: Variant) -> Iterator[None]:
    """Resumes this server; if the others cannot be stopped, waits until they sleep."""
    if variant.group is None:
        time.sleep(SPIN_SECONDS)
        yield
        return
    _signal(variant.group, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(variant.group, signal.SIGSTOP)


def _signal(group: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has died; the next request to it will say so
        os.killpg(group, what)
