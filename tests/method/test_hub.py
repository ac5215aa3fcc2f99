"""Adapters by name: a Hugging Face cache as huggingface_hub lays it out, and a hub on loopback."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import make_adapter

pytest.importorskip("huggingface_hub")

from lora_drop_vllm.cli import main
from lora_drop_vllm.config import resolve
from lora_drop_vllm.hub import adapter_folder
from lora_drop_vllm.method.adapter import BaseModel
from lora_drop_vllm.method.adapter_folder import AdapterError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
BASE = BaseModel("llama", 8, 128)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """Two revisions of an adapter, `main` with k = 3 and `v1` with k = 5."""
    root = tmp_path_factory.mktemp("repository")
    for revision, k in (("main", 3), ("v1", 5)):
        make_adapter(root / revision, models["llama"], drop_layers=[3, 5], k=k)
    return root


class Hub(BaseHTTPRequestHandler):
    """What `hf_hub_download` asks the hub, for one repository, `org/adapter`."""

    root: Path
    asked: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append((self.command, self.headers.get("Authorization", "")))
        parts = self.path.strip("/").split("/")
        if parts[:2] != ["org", "adapter"]:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        revision = next((r for r, c in COMMITS.items() if parts[3] in (r, c)), None)
        if revision is None:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        data = (self.root / revision / parts[4]).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self._answer(200, {"X-Repo-Commit": COMMITS[revision], "ETag": f'"{digest}"'}, data)

    def _answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, reachable, with a token."""
    from huggingface_hub import constants

    Hub.root, Hub.asked = repository, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill(cache: Path, repository: Path) -> Path:
    """Lays the adapter's `main` out as huggingface_hub does; returns the snapshot's folder."""
    home = cache / "models--org--adapter"
    snapshot = home / "snapshots" / COMMITS["main"]
    for folder in (home / "refs", home / "blobs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs/main").write_text(COMMITS["main"])
    for file in (repository / "main").iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, home / "blobs" / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


@pytest.mark.parametrize("name", ["org/adapter", "org/adapter@main", f"org/adapter@{'a' * 40}"])
def test_an_adapter_in_the_cache_needs_no_network(cache: Path, repository: Path, name: str) -> None:
    snapshot = fill(cache, repository)
    config = resolve({"adapter": name}, BASE)
    assert config.adapter == str(snapshot) and config.k == 3


def test_the_hub_is_asked_with_the_token_and_only_once(cache: Path, hub: type[Hub]) -> None:
    folder = adapter_folder("org/adapter@v1")
    assert folder == cache / "models--org--adapter/snapshots" / COMMITS["v1"]
    assert resolve({"adapter": "org/adapter@v1"}, BASE).k == 5
    assert resolve({"adapter": "org/adapter"}, BASE).k == 3
    assert [method for method, _ in hub.asked].count("GET") == 3  # both revisions share a file
    assert {token for _, token in hub.asked} == {"Bearer hf_secret"}


def test_a_path_that_exists_wins(cache: Path, hub: type[Hub], repository: Path) -> None:
    shutil.copytree(repository / "v1", "org/adapter")
    assert adapter_folder("org/adapter") == Path("org/adapter")
    assert resolve({"adapter": "org/adapter"}, BASE).k == 5 and not hub.asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/other", "there is no such repository; a private one needs HF_TOKEN"),
        ("org/adapter@v2", "there is no such revision; use a branch, tag or commit"),
    ],
)
def test_what_the_hub_does_not_have(hub: type[Hub], name: str, message: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter='{name}': no such folder.*{message}"):
        adapter_folder(name)


def test_offline_says_what_to_do(cache: Path, models: dict[str, Path], capsys: object) -> None:
    with pytest.raises(AdapterError, match=r"not in the cache .*hub, and .* HF_HUB_OFFLINE=1; do"):
        adapter_folder("org/adapter")
    assert main(["check", str(models["llama"]), "--adapter", "org/adapter"]) == 2


@pytest.mark.parametrize("path", ["/org/adapter", "./adapter", "adapter", "a/b/c", "org/adapter@"])
def test_a_path_is_no_name(cache: Path, path: str) -> None:
    assert adapter_folder(path) == Path(path)
