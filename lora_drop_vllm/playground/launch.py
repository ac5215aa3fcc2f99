"""Starts the playground: a server of its own or a running one behind it, a page or a terminal."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_vllm.playground.answers import Sampling
from lora_drop_vllm.playground.served import Served, look
from lora_drop_vllm.server_process import Endpoint, Server

NEEDED = ("fastapi", "openai", "uvicorn")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Model:
    """What to serve where no running server is named.

    Attributes:
        settings: the value of `lora_drop` in `--additional-config`
        dtype: as for vLLM
    """

    path: Path
    settings: Mapping[str, Any]
    dtype: str = "auto"

    def arguments(self) -> list[str]:
        """What `vllm serve` is given."""
        settings = json.dumps({"lora_drop": dict(self.settings)})
        given = ["--model-impl", "lora_drop", "--additional-config", settings]
        return [*given, "--dtype", self.dtype]


def open_page(behind: Model | str, host: str = "127.0.0.1", port: int = 7210) -> None:
    """Serve the page until Ctrl-C.

    Args:
        behind: a model to serve, or the URL of a running server
        host: to listen on
        port: of the page

    Raises:
        ValueError: the port is taken, or what runs there is no server with LoRA-Drop.
        RuntimeError: the extra is not installed, or no server answers or comes up.
    """
    _check_installed()
    with _listening(host, port) as listener, _running(behind) as (endpoint, served):
        import uvicorn

        from lora_drop_vllm.playground.app import create_app

        hosts = LOOPBACK if host in LOOPBACK else None
        app = create_app(endpoint, served, hosts)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        listener.listen()  # whoever opens the address now waits for the first answer
        print(f"Playground: {address} (Ctrl-C stops it)", flush=True)
        if hosts is None:
            print(f"Whoever reaches {host} can use the model, and the server's key if it has one.")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[listener])


def answer_in_terminal(behind: Model | str, text: str, k: int | None, sampling: Sampling) -> None:
    """Print both answers to one prompt, coloured, and a table.

    Raises:
        ValueError, RuntimeError: as for `open_page`, or the server refuses the prompt.
    """
    _check_installed()
    with _running(behind) as (endpoint, served):
        from lora_drop_vllm.playground.terminal import compare

        compare(endpoint, served, text, served.k if k is None else k, sampling, sys.stdout)


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"playground: needs {', '.join(missing)}; pip install 'lora_drop_vllm[playground]'"
        )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound before a server starts: a taken port is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--host {host} --port {port}: cannot listen there ({error}); choose another "
                "--port, or --port 0 for a free one"
            ) from error
        yield listener


@contextmanager
def _running(behind: Model | str) -> Iterator[tuple[Endpoint, Served]]:
    """The server behind the page, and what it serves."""
    if isinstance(behind, str):
        endpoint = Endpoint.at(behind)
        yield endpoint, look(endpoint)
        return
    server = Server(behind.path, behind.arguments())
    with _progress(f"Starting vLLM with {behind.path} (log: {server.log})"):
        server.start()
    try:
        yield server, look(server, behind.path.name)
    finally:
        server.stop()


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """A line that counts the seconds while the block runs; plain where nobody watches."""
    done, watched, start = threading.Event(), sys.stderr.isatty(), time.monotonic()

    def count() -> None:
        while not done.wait(1):
            print(f"\r{what}: {time.monotonic() - start:.0f} s ", end="", file=sys.stderr)

    print(what, end="" if watched else "\n", file=sys.stderr, flush=True)
    counter = threading.Thread(target=count, daemon=True)
    if watched:
        counter.start()
    try:
        yield
    finally:
        done.set()
        if watched:
            counter.join()
            print(file=sys.stderr)
