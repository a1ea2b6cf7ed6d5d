"""A stand-in for the Hugging Face hub on this machine: repositories with branches and commits, gated and missing ones."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """`repositories`: id -> branch or commit -> folder; a branch's commit is derived from the folder's name."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.url = ""

    def push(self, name: str, folder: Path, branch: str = "main") -> str:
        """Make `folder` the head of a branch; its commit."""
        commit = commit_of(folder)
        self.repositories.setdefault(name, {}).update({branch: folder, commit: folder})
        return commit

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes huggingface_hub talk to this hub alone."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, content = answer(hub, self.path.partition("?")[0])
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, as the hub gives them."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        name, what = "/".join(parts[2:4]), parts[4:]
    else:
        name, what = "/".join(parts[:2]), parts[2:]
    if name in hub.gated:
        return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
    if name not in hub.repositories:
        return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
    revision = what[1] if len(what) > 1 else "main"
    folder = hub.repositories[name].get(revision)
    if folder is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    if parts[:2] == ["api", "models"]:
        if what[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": _etag(folder / f)}
                for f in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        listing = {"id": name, "sha": commit_of(folder), "siblings": [{"rfilename": f} for f in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
    file = "/".join(what[2:])
    if file not in files:
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
    headers = {"ETag": f'"{_etag(folder / file)}"', "X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
    return 200, headers, (folder / file).read_bytes()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
