"""A server with LoRA-Drop to talk to: one that runs already, or a `vllm serve` that we start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_SECONDS = 900
STOP_SECONDS = 30
# eager: compiling takes minutes; the numbers compare k > 0 with k = 0 under the same settings
ARGUMENTS = ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", "512M"]
_METRIC = re.compile(
    r"^vllm:lora_drop_(?!info)(\w+?)(?:_total)?\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE
)
_INFO = re.compile(r"^vllm:lora_drop_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Endpoint:
    """URL of a server (without `/v1`), and the name of its model."""

    url: str
    name: str

    @classmethod
    def at(cls, url: str) -> Endpoint:
        """The server at a URL, with or without `/v1`; asks it for the name of its model.

        Raises:
            RuntimeError: no server answers there.
        """
        from openai import APIError

        found = cls(url.rstrip("/").removesuffix("/v1"), "")
        try:
            found.name = found.client().models.list().data[0].id
        except APIError as error:
            raise RuntimeError(
                f"--url {url}: no OpenAI-compatible server answers ({error}); start one with "
                "vllm serve MODEL --model-impl lora_drop"
            ) from error
        return found

    def client(self) -> Any:
        """OpenAI client of this server; takes its key from OPENAI_API_KEY, if that is set."""
        from openai import OpenAI

        return OpenAI(**self._access())

    def async_client(self) -> Any:
        """The same as `client`, for coroutines."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(**self._access())

    def _access(self) -> dict[str, Any]:
        key = os.environ.get("OPENAI_API_KEY", "none")
        return {"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0}

    def max_len(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return int(self.client().models.list().data[0].max_model_len)

    def metrics_text(self) -> str:
        """What `/metrics` answers."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def metrics(self) -> dict[str, int]:
        """LoRA-Drop's counters and gauge at `/metrics`, by name without prefix and suffix.

        Values of several engines (`--data-parallel-size`) are added up.
        """
        return counters(self.metrics_text())


def counters(text: str) -> dict[str, int]:
    """LoRA-Drop's counters and gauge in the text of `/metrics`, summed over the engines."""
    sums: Counter[str] = Counter()
    for name, value in _METRIC.findall(text):
        if "created" not in name:
            sums[name] += int(float(value))
    return dict(sums)


def served_settings(text: str) -> dict[str, str]:
    """What LoRA-Drop serves with, from the text of `/metrics`; empty where it does not run."""
    found = _INFO.search(text)
    return dict(_LABEL.findall(found[1])) if found else {}


class Server(Endpoint):
    """Context manager around one server process.

    Attributes:
        log: file with everything that the server has printed since its start
        process: None before `start` and after `stop`
    """

    def __init__(
        self,
        model: Path,
        arguments: list[str],
        port: int | None = None,
        start_seconds: int = START_SECONDS,
    ) -> None:
        self._start_seconds = start_seconds
        self.port = port or _free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", "model")
        log, name = tempfile.mkstemp(prefix="lora_drop_server_", suffix=".log")
        os.close(log)
        self.log = Path(name)
        vllm = Path(sys.executable).with_name("vllm")
        self._command = [str(vllm), "serve", str(model), "--port", str(self.port)]
        self._command += ["--served-model-name", self.name, *ARGUMENTS, *arguments]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Starts the server and waits until it serves; stops it first if it runs already.

        Raises:
            RuntimeError: the server did not start; the message has the end of its log.
        """
        self.stop()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("wb") as log:
            # its own session: Ctrl-C reaches only us, and `stop` ends all its processes
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(self.process)
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks the server to stop, and kills it if it does not."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"the server stopped while it started:\n{tail}\nLog: {self.log}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            time.sleep(0.5)
        raise RuntimeError(
            f"the server did not start within {self._start_seconds} s; log: {self.log}"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
