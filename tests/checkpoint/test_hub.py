"""Loading from a hub: a small local server speaks its HTTP, each load is a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from adapter_writer import write_adapter
from builders import TINY, small_bpe, write_bpe, write_checkpoint
from safetensors.numpy import load_file
from torch_writer import write_zip

COMMITS = {"main": "a" * 40, "old": "b" * 40}
ROOT = Path(__file__).parents[2]
LOAD = """
import json, os, sys
from gpt2cupy import checkpoint
from gpt2cupy.errors import CheckpointError
from gpt2cupy.tokenizer import Tokenizer
name, revision = sys.argv[1], sys.argv[2] or None
options = {key.lower(): os.environ.get(key) for key in ("VARIANT", "ADAPTER")}
try:
    found = checkpoint.open(name, revision=revision, **options)
    total = sum(float(array.astype("f8").sum()) for _, _, array in found.tensors())
    words = Tokenizer.from_path(found.path).vocab_size
    print(json.dumps({"path": str(found.path), "total": total, "words": words}))
except CheckpointError as error:
    print(json.dumps({"what": error.what, "where": error.where, "remedy": error.remedy}))
"""


class Hub(ThreadingHTTPServer):
    """Serves ``folders[repository][revision]``; notes what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders: dict[str, dict[str, Path]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The calls that snapshot_download makes: revision, tree (or siblings), resolve."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, model, call, revision, *rest = [*(parts[2:] if api else parts), "", "", "", ""]
        repository = f"{owner}/{model}"
        if repository == "owner/gated":
            return self.fail(403, "GatedRepo")
        if repository not in self.server.folders:
            return self.fail(404, "RepoNotFound")
        revision = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
        folder = self.server.folders[repository].get(revision)
        if folder is None:
            return self.fail(404, "RevisionNotFound")
        if not api:
            return self.send_file(folder / "/".join(part for part in rest if part), revision)
        files = [file for file in folder.iterdir() if file.is_file()]
        if call == "tree":
            return self.send_json([self.entry(file) for file in files])
        siblings = [{"rfilename": file.name} for file in files]
        return self.send_json({"id": repository, "sha": COMMITS[revision], "siblings": siblings})

    def entry(self, file: Path) -> dict:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}

    def send_file(self, file: Path, revision: str) -> None:
        if not file.is_file():
            self.fail(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMITS[revision]}
        self.reply(200, file.read_bytes(), headers)

    def send_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    for seed, revision in enumerate(COMMITS):
        folder = tmp_path / "hub" / revision
        write_checkpoint(folder, TINY, seed, shards=2 if revision == "old" else 1)
        write_bpe(folder, *small_bpe())
        for name in ("pytorch_model.bin", "README.md", "flax_model.msgpack", "other.safetensors"):
            (folder / name).write_bytes(b"not wanted")
    server = Hub()
    folders = {revision: tmp_path / "hub" / revision for revision in COMMITS}
    server.folders = {"owner/model": folders, "openai-community/gpt2": folders}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(hub: Hub, home: Path, name: str, revision: str = "", **settings: str) -> dict:
    """Open a checkpoint in a new process, whose hub is ours; "errors" is its stderr."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name, revision],
        env=kept | ours | {"PYTHONPATH": str(ROOT)} | settings,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"errors": done.stderr}


def test_a_hub_id_is_downloaded_once_and_works_offline(hub, tmp_path):
    home = tmp_path / "home"
    first = load(hub, home, "owner/model")
    assert first["path"].startswith(str(home))
    assert first["words"] == len(small_bpe()[0])
    fetched = {line.split("/")[-1] for line in hub.asked if line.startswith("GET /owner/")}
    assert fetched == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert "Fetching" in first["errors"], "the hub's progress bar"

    hub.asked.clear()
    second = load(hub, home, "owner/model")
    assert second["total"] == first["total"]
    assert not [line for line in hub.asked if line.startswith("GET /owner/")]

    hub.asked.clear()
    offline = load(hub, home, "owner/model", HF_HUB_OFFLINE="1")
    assert (offline["total"], hub.asked) == (first["total"], [])


def test_a_hub_that_went_away_leaves_the_cache(hub, tmp_path):
    first = load(hub, tmp_path / "home", "owner/model")
    again = load(hub, tmp_path / "home", "owner/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert again["total"] == first["total"]


def test_revisions(hub, tmp_path):
    found = {}
    for revision in ("main", "old", COMMITS["old"]):
        found[revision] = load(hub, tmp_path / "home", "owner/model", revision)["total"]
    assert found["old"] == found[COMMITS["old"]] != found["main"]


def test_an_alias(hub, tmp_path):
    assert "openai-community--gpt2" in load(hub, tmp_path / "home", "gpt2")["path"]


@pytest.mark.parametrize(
    ("name", "revision", "settings", "what", "remedy"),
    [
        ("owner/nothing", "", {}, "no such model", "hf auth login"),
        ("owner/gated", "", {}, "gated", "huggingface.co/owner/gated"),
        ("owner/model", "v9", {}, "no revision 'v9'", "branch"),
        ("owner/model", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached", "network"),
        ("owner/model", "", {"HF_HUB_OFFLINE": "1"}, "cannot be reached", "HF_HUB_OFFLINE"),
    ],
)
def test_what_the_hub_does_not_give(hub, tmp_path, name, revision, settings, what, remedy):
    error = load(hub, tmp_path / "home", name, revision, **settings)
    assert what in error["what"] and remedy in error["remedy"]
    assert error["where"] == name


def test_a_repository_without_safetensors(hub, tmp_path):
    folder = tmp_path / "hub" / "main"
    first = load(hub, tmp_path / "first", "owner/model")
    write_zip(folder / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    hub.asked.clear()
    found = load(hub, tmp_path / "home", "owner/model")
    assert found["total"] == first["total"]
    fetched = {line.split("/")[-1] for line in hub.asked if line.startswith("GET /owner/")}
    assert fetched == {"config.json", "pytorch_model.bin", "vocab.json", "merges.txt"}
    offline = load(hub, tmp_path / "home", "owner/model", HF_HUB_OFFLINE="1")
    assert offline["total"] == first["total"]


def test_a_variant_and_an_adapter(hub, tmp_path):
    """Of each only what is asked for; an adapter in place of a model is said to be one."""
    folder = tmp_path / "hub" / "main"
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    adapter = write_adapter(tmp_path / "hub" / "adapter")
    (adapter / "README.md").write_text("not wanted")
    hub.folders["owner/adapter"] = {"main": adapter}
    plain = load(hub, tmp_path / "home", "owner/model", VARIANT="fp16")
    hub.asked.clear()
    found = load(hub, tmp_path / "home", "owner/model", VARIANT="fp16", ADAPTER="owner/adapter")
    assert found["total"] != plain["total"]
    fetched = {line.split("/")[-1] for line in hub.asked if line.startswith("GET /owner/")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    assert "folder of an adapter" in load(hub, tmp_path / "home", "owner/adapter")["what"]


def test_a_repository_without_weights(hub, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / "hub" / "main" / name).unlink()
    assert "no pytorch_model.bin" in load(hub, tmp_path / "home", "owner/model")["what"]
