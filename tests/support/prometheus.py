"""A real Prometheus that scrapes one server, with the configuration of docker/compose.yaml."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCKER = Path(__file__).parents[2] / "docker"
SECONDS = 60  # until it answers


@dataclass
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        asked = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def wait_for(self, expression: str) -> None:
        """Waits until an expression gives a series."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if self.query(expression):
                    return
            time.sleep(0.3)
        raise TimeoutError(expression)


@contextlib.contextmanager
def scraping(server: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the served URL in place of compose.yaml's server, scraped each second."""
    import yaml

    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    config = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    config["global"]["scrape_interval"] = "1s"
    (static,) = config["scrape_configs"][0]["static_configs"]
    static["targets"] = [urllib.parse.urlsplit(server).netloc]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def dashboard_queries() -> dict[str, str]:
    """The queries of docker/grafana.json by panel and legend, Grafana's variables filled in."""
    board = json.loads((DOCKER / "grafana.json").read_text())
    filled = {"$__rate_interval": "1m", "$model": ".*"}
    found = {}
    for panel in board["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in filled.items():
                expression = expression.replace(name, value)
            found[f"{panel['title']}: {target.get('legendFormat', '')}"] = expression
    return found
