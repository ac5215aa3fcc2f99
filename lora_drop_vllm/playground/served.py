"""What the server behind the playground serves, read from its `/v1/models` and `/metrics`."""

from __future__ import annotations

import urllib.error
from dataclasses import dataclass

from lora_drop_vllm.server_process import Endpoint, counters, served_settings

WAY_OUT = (
    "start one with vllm serve MODEL --model-impl lora_drop --additional-config "
    '\'{"lora_drop": {"adapter": "DIR"}}\''
)


@dataclass(frozen=True)
class Served:
    """A server that runs LoRA-Drop.

    Attributes:
        name: what it calls the model
        title: what people call it
        k: LoRA steps between two full steps; a request may ask for fewer
        attention_only: those of the drop layers whose own MLP runs in LoRA steps
        adapter: name of the adapter's folder; empty for an untrained one
        max_len: tokens of prompt and answer together
    """

    url: str
    name: str
    title: str
    k: int
    num_layers: int
    drop_layers: tuple[int, ...]
    attention_only: tuple[int, ...]
    reuse: str
    kv: str
    adapter: str
    max_len: int

    @property
    def kv_skips(self) -> bool:
        """True if LoRA steps write no KV slot in the drop layers."""
        return self.kv == "skip"


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(number) for number in listed.split(",") if number)


def look(endpoint: Endpoint, title: str = "") -> Served:
    """Ask a server what it serves.

    Args:
        title: of the model, if it is not what the server calls it

    Raises:
        ValueError: it does not run LoRA-Drop, or lets no request bring a k of its own.
        RuntimeError: it does not answer.
    """
    try:
        metrics = endpoint.metrics_text()
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(f"{endpoint.url}/metrics: no answer ({error}); {WAY_OUT}") from error
    if not counters(metrics):
        raise ValueError(
            f"{endpoint.url}: this server does not run LoRA-Drop (no counter of it at /metrics), "
            f"or with k=0, or with --disable-log-stats; {WAY_OUT}"
        )
    settings = served_settings(metrics)
    if not settings:
        raise ValueError(
            f"{endpoint.url}: its lora_drop_vllm is too old to tell the kinds of its steps; "
            "install the version of this command there, too"
        )
    if settings["least_k"] != "0":
        raise ValueError(
            f"{endpoint.url}: started with lora_drop.request_k so that no request can ask the "
            f"base model (k=0; least k: {settings['least_k']}); start it without that setting"
        )
    return Served(
        url=endpoint.url,
        name=endpoint.name,
        title=title or endpoint.name,
        k=int(settings["k"]),
        num_layers=int(settings["num_layers"]),
        drop_layers=_numbers(settings["drop_layers"]),
        attention_only=_numbers(settings.get("attention_only", "")),
        reuse=settings["reuse"],
        kv=settings["kv"],
        adapter=settings["adapter"],
        max_len=endpoint.max_len(),
    )
