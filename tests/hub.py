"""A Hugging Face Hub on loopback, in memory: real HTTP for the calls that the tests make through huggingface_hub.

A `Fault` makes it fail: with a status, by dropping the connection in the middle of a request, or by serving the
request without an answer.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

USER, ORGANIZATION = "ada", "lovelace-lab"
WRITE_TOKEN = "hf_test_write"
READ_TOKEN = "hf_test_read"
SCOPED_TOKEN = "hf_test_scoped_to_the_organization"
ACCESS: dict[str, dict[str, Any]] = {
    WRITE_TOKEN: {"role": "write"},
    READ_TOKEN: {"role": "read"},
    SCOPED_TOKEN: {
        "role": "fineGrained",
        "fineGrained": {
            "global": [],
            "scoped": [{"entity": {"type": "org", "name": ORGANIZATION}, "permissions": ["repo.write"]}],
        },
    },
}

LICENCES = ("apache-2.0", "mit", "bigscience-bloom-rail-1.0", "other")
"""Those that this Hub knows."""


@dataclass
class Commit:
    oid: str
    title: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    licence: str | None = None
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {})

    def commit(
        self, branch: str, title: str, files: dict[str, bytes], message: str = "", deleted: Collection[str] = ()
    ) -> Commit:
        history = self.branches.setdefault(branch, [])
        old_files = history[-1].files if history else {}
        kept = {path: content for path, content in old_files.items() if path not in deleted}
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()  # unique, because the tests share one download cache
        history.append(Commit(oid, title, message, {**kept, **files}))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        revision = self.tags.get(revision, revision)
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)

    def history(self, revision: str) -> list[Commit]:
        """Return the commits up to a revision, oldest first."""
        commit = self.at(revision)
        for history in self.branches.values():
            if commit in history:
                return history[: history.index(commit) + 1]
        return []

    @property
    def titles(self) -> list[str]:
        return [commit.title for commit in self.branches["main"]]


@dataclass
class Fault:
    """How the server treats the next `times` requests whose `METHOD path` matches `pattern`.

    `status` answers with that status, `drop` hangs up in the middle of the request, `lose_answer` serves it and hangs
    up, `before` only calls `action`, `answer` answers with `status` and `content`, whatever was asked. `dribble` sends
    a byte of the answer's content at a time, and `dribble_headers` a byte of its headers, until the client hangs up.
    Every kind calls `action` first.
    """

    pattern: str
    kind: Literal["status", "drop", "lose_answer", "before", "answer", "dribble", "dribble_headers"]
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    action: Callable[[], object] | None = None
    content: bytes = b""


class Hub:
    """The server's repos, the requests it has received, and the faults it will produce."""

    def __init__(self) -> None:
        self.models: dict[str, Repo] = {}
        self.datasets: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bytes_served: dict[str, int] = {}
        """The bytes of each file that were downloaded, by its path."""
        self.faults: list[Fault] = []
        self.url = ""

    def repos(self, kind: str) -> dict[str, Repo]:
        return self.datasets if kind == "datasets" else self.models

    def next_fault(self, call: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, call):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        call = f"{self.command} {path}"
        self.hub.requests.append(call)
        fault = self.hub.next_fault(call)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.action is not None:
            fault.action()
        if fault is not None and fault.kind == "drop":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        self._mute = fault is not None and fault.kind == "lose_answer"
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, {"error": "told to fail"}, fault.headers)
            return
        if fault is not None and fault.kind == "answer":
            self._answer(fault.status, fault.content, fault.headers)
            return
        if fault is not None and fault.kind.startswith("dribble"):
            self._dribble(fault)
            return
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, call):
                method(self, body, *match.groups())
                return
        self._answer(404, {"error": f"no route for {call}"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_PUT = do_GET

    def _dribble(self, fault: Fault) -> None:
        self.close_connection = True
        headers = {"Content-Length": "100000", "Connection": "close", **fault.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (head if fault.kind == "dribble" else "X-Slow: ").encode())
        with contextlib.suppress(OSError):  # the client has hung up
            while True:
                self.wfile.write(fault.content or b" ")
                time.sleep(0.05)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if self._mute:
            self._hang_up()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self, name: str) -> bool:
        token = self._token()
        if token == WRITE_TOKEN or (token == SCOPED_TOKEN and name.startswith(f"{ORGANIZATION}/")):
            return True
        if token in ACCESS:
            self._answer(403, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"})
        else:
            self._answer(401, {"error": "Invalid user token."})
        return False

    def _repo(self, kind: str, name: str, revision: str = "main") -> tuple[Repo, Commit] | None:
        repo = self.hub.repos(kind).get(name)
        if repo is None or (repo.private and self._token() not in ACCESS):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif (commit := repo.at(revision)) is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo, commit
        return None

    def whoami(self, body: bytes) -> None:
        if (access := ACCESS.get(self._token())) is None:
            self._answer(401, {"error": "Invalid user token."})
            return
        organizations = [{"name": ORGANIZATION, "roleInOrg": "write"}]
        self._answer(200, {"type": "user", "name": USER, "orgs": organizations, "auth": {"accessToken": access}})

    def auth_check(self, body: bytes, kind: str, name: str, write: str | None) -> None:
        if (found := self._repo(kind, name)) is None:
            return
        if found[0].gated:
            self._answer(403, {"error": "Access to this repo is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif not write or self._may_write(name):
            self._answer(200, {})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.models:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.models[name] = Repo(name, private=wanted.get("visibility") == "private")
        self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        if (found := self._repo(kind, name, revision or "main")) is not None:
            repo, commit = found
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            card = {"license": repo.licence} if repo.licence else {}
            about = {"id": name, "private": repo.private, "sha": commit.oid, "siblings": siblings, "tags": []}
            self._answer(200, {**about, "cardData": card})

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        if (found := self._repo(kind, name, revision)) is not None:
            self._answer(200, [_entry(path, found[1]) for path in sorted(found[1].files)] if not folder else [])

    def paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if (found := self._repo(kind, name, revision)) is not None:
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._answer(200, [_entry(path, found[1]) for path in wanted if path in found[1].files])

    def commits(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if (found := self._repo(kind, name, revision)) is not None:
            history = found[0].history(revision)
            self._answer(
                200,
                [
                    {
                        "id": c.oid,
                        "title": c.title,
                        "message": c.message,
                        "authors": [],
                        "date": "2026-01-01T00:00:00.000Z",
                    }
                    for c in reversed(history)
                ],
            )

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if self._may_write(name) and (found := self._repo("models", name)) is not None:
            if branch in found[0].branches:
                self._answer(409, {"error": "Reference already exists"})
                return
            history = found[0].history(json.loads(body).get("startingPoint", "main"))
            found[0].branches[branch] = list(history)
            self._answer(200, {})

    def refs(self, body: bytes, name: str) -> None:
        if (found := self._repo("models", name)) is not None:
            branches = {branch: history[-1].oid for branch, history in found[0].branches.items()}
            refs = {
                kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid} for n, oid in names.items()]
                for kind, place, names in (("branches", "heads", branches), ("tags", "tags", found[0].tags))
            }
            self._answer(200, {**refs, "converts": []})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write(name) or (found := self._repo("models", name, revision)) is None:
            return
        tag = json.loads(body)["tag"]
        if tag in found[0].tags:
            self._answer(409, {"error": "Reference already exists"})
            return
        found[0].tags[tag] = found[1].oid
        self._answer(200, {})

    def validate_yaml(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        base = re.search(r"^base_model: *(.*)$", card, re.MULTILINE)
        wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1])
        errors = [{"message": '"base_model" must be a Hub id'}] if wrong else []
        licence, name = (re.search(rf"^{field}: *(.*)$", card, re.MULTILINE) for field in ("license", "license_name"))
        if licence is not None and licence[1] not in LICENCES:
            errors.append({"message": f'"license" must be one of {LICENCES}'})
        if licence is not None and licence[1] == "other" and not (name and re.fullmatch("[a-z0-9.-]+", name[1])):
            errors.append({"message": '"license_name" must be in small letters'})
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write(name):
            return
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        self._answer(
            200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        )

    def lfs_batch(self, body: bytes, name: str) -> None:
        if not self._may_write(name):
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
        if not self._may_write(name) or (found := self._repo("models", name, branch)) is None:
            return
        header, files, deleted = {}, {}, []
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                header = entry["value"]
            elif entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(entry["value"]["path"])
        if header.get("parentCommit") not in (None, found[1].oid):
            self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        commit = found[0].commit(branch, header["summary"], files, header.get("description", ""), deleted)
        url = f"{self.hub.url}/{name}/commit/{commit.oid}"
        self._answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url})

    def resolve(self, body: bytes, kind: str | None, name: str, revision: str, path: str) -> None:
        if (found := self._repo((kind or "models/").rstrip("/"), name, revision)) is None:
            return
        repo, commit = found
        if repo.gated:
            self._answer(403, {"error": "Access to this repo is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif path not in commit.files:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = commit.files[path]
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if part and self.command == "GET":
                start, end = int(part[1]), min(int(part[2]) + 1, len(content))
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
                content = content[start:end]
            if self.command == "GET":
                self.hub.bytes_served[path] = self.hub.bytes_served.get(path, 0) + len(content)
            self._answer(206 if part else 200, content, headers)


def _entry(path: str, commit: Commit) -> dict[str, Any]:
    content = commit.files[path]
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


_NAME = r"([\w.-]+/[\w.-]+)"
_REPO = rf"(models|datasets)/{_NAME}"
_ROUTES = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    (f"GET /api/{_REPO}/auth-check(/write)?", _Handler.auth_check),
    (f"GET /api/{_REPO}/revision/(.+)", _Handler.info),
    (f"GET /api/{_REPO}/commits/(.+)", _Handler.commits),
    (f"GET /api/{_REPO}/tree/([^/]+)/?(.+)?", _Handler.tree),
    (f"POST /api/{_REPO}/paths-info/(.+)", _Handler.paths_info),
    (f"GET /api/{_REPO}", _Handler.info),
    (f"GET /api/models/{_NAME}/refs", _Handler.refs),
    (f"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (f"POST /api/models/{_NAME}/tag/(.+)", _Handler.tag),
    (f"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (f"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT /lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (f"(?:GET|HEAD) /(datasets/)?{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


class Server:
    """A Hub on a free loopback port; `fresh` replaces its content with an empty one."""

    def __init__(self) -> None:
        self._handler = type("Handler", (_Handler,), {"hub": Hub()})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fresh(self) -> Hub:
        hub = Hub()
        hub.url = self.url
        self._handler.hub = hub  # type: ignore[attr-defined]
        return hub
