"""A stand-in for the Hugging Face Hub on loopback: real HTTP, in memory, the calls that huggingface_hub makes here."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE_TOKEN = "hf_test_write"
READ_TOKEN = "hf_test_read"
USER = "ada"


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {})

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        history = self.branches.setdefault(branch, [])
        before = history[-1].files if history else {}
        oid = hashlib.sha1(f"{self.name} {branch} {len(history)} {title}".encode()).hexdigest()
        history.append(Commit(oid, title, {**before, **files}))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)


class Hub:
    """What the server holds, what was asked of it, and what it is told to fail at."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail_at: str | None = None
        """A pattern of `METHOD path`: such a request is answered with 500."""
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = f"{self.command} {path}"
        self.hub.requests.append(call)
        if self.hub.fail_at is not None and re.search(self.hub.fail_at, call):
            self._answer(500, {"error": "told to fail"})
            return
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, call):
                method(self, body, *match.groups())
                return
        self._answer(404, {"error": f"no route for {call}"}, {"X-Error-Code": "EntryNotFound"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may(self, *tokens: str) -> bool:
        if self._token() in tokens:
            return True
        if self._token() in (READ_TOKEN, WRITE_TOKEN):
            self._answer(403, {"error": "Forbidden: this token may only read"})
        else:
            self._answer(401, {"error": "Invalid user token."})
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token() not in (READ_TOKEN, WRITE_TOKEN)):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def whoami(self, body: bytes) -> None:
        if self._may(READ_TOKEN, WRITE_TOKEN):
            self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def create(self, body: bytes) -> None:
        if not self._may(WRITE_TOKEN):
            return
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.repos[name] = Repo(name, private=wanted.get("visibility") == "private")
        self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (repo := self._repo(name)) is None:
            return
        if (commit := repo.at(revision or "main")) is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self._answer(200, {"id": name, "private": repo.private, "sha": commit.oid, "siblings": siblings, "tags": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if (repo := self._repo(name)) is not None and self._may(WRITE_TOKEN):
            repo.branches.setdefault(branch, list(repo.branches["main"]))
            self._answer(200, {})

    def validate_yaml(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        base = re.search(r"^base_model: *(.*)$", card, re.MULTILINE)
        errors = (
            [{"message": '"base_model" must be a Hub id'}]
            if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1])
            else []
        )
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if not self._may(WRITE_TOKEN):
            return
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if not self._may(WRITE_TOKEN):
            return
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        if not self._may(WRITE_TOKEN) or (repo := self._repo(name)) is None:
            return
        title, files = "", {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                title = entry["value"]["summary"]
            elif entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
        commit = repo.commit(branch, title, files)
        url = f"{self.hub.url}/{name}/commit/{commit.oid}"
        self._answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        if (commit := repo.at(revision)) is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif path not in commit.files:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = commit.files[path]
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"'})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    (f"GET /api/models/{_REPO}/revision/(.+)", _Handler.info),
    (f"GET /api/models/{_REPO}", _Handler.info),
    (f"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (f"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (f"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT /lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (f"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
