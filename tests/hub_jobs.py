"""Hugging Face Jobs and buckets on the Hub of tests/hub.py: a "container" is a process in an empty folder.

It has the environment and the secrets that were sent, and nothing else of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import hub

ROOT = Path(__file__).parents[1]
NOW = "2026-11-01T00:00:00.000Z"
HARDWARE = [
    {"name": name, "prettyName": name, "cpu": "4 vCPU", "ram": "16 GB", "ephemeralStorage": "50 GB"}
    | {"accelerator": None, "unitCostMicroUSD": cost, "unitCostUSD": cost / 1e6, "unitLabel": "minute"}
    for name, cost in (("cpu-basic", 167), ("l4x1", 13333))
]


@dataclass
class Job:
    spec: dict[str, Any]
    owner: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    stage: str = "RUNNING"
    message: str | None = None
    logs: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    """Of each attempt."""
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    thread: threading.Thread = field(default_factory=threading.Thread)

    def cancel(self) -> None:
        if self.stage == "RUNNING":
            self.stage = "CANCELED"
        if self.process is not None:
            self.process.kill()

    def as_json(self) -> dict[str, Any]:
        spec = {name: self.spec.get(name) for name in ("command", "environment", "flavor", "labels")}
        owner = {"id": "1", "name": self.owner, "type": "user"}
        return (
            {"id": self.id, "createdAt": NOW, "owner": owner, "durations": {"runningSecs": 90}}
            | spec
            | {
                "dockerImage": self.spec.get("dockerImage"),
                "status": {"stage": self.stage, "message": self.message},
            }
        )

    def run(self, environment: dict[str, str]) -> None:
        """Run the attempts; the first one that succeeds is the last one."""
        deadline = self.started + self.spec.get("timeoutSeconds", 1800)
        for _ in range(self.spec.get("attempts") or 1):
            if self.stage == "CANCELED":
                return
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable if word == "python" else word for word in self.spec["command"]]
                sent = {**self.spec["environment"], **self.spec.get("secrets", {}), "JOB_ID": self.id}
                self.process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**environment, "HOME": folder, "HF_HOME": f"{folder}/cache", **sent},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                if self.stage == "CANCELED":  # since it was looked at
                    self.process.kill()
                timer = threading.Timer(max(0.0, deadline - time.monotonic()), self.process.kill)
                timer.start()
                assert self.process.stdout is not None
                with self.process.stdout:
                    self.logs += (line.decode(errors="replace").rstrip("\n") for line in self.process.stdout)
                self.exit_codes.append(self.process.wait())
                timer.cancel()
            if self.exit_codes[-1] == 0 or self.stage == "CANCELED" or time.monotonic() >= deadline:
                break
        if self.stage != "CANCELED":
            self.stage = "COMPLETED" if self.exit_codes[-1] == 0 else "ERROR"
            self.message = "Job timeout" if self.exit_codes[-1] == -signal.SIGKILL else None


@dataclass
class JobsHub:
    """What the Hub of the tests has besides repos."""

    environment: dict[str, str]
    """What each container has before anything is sent."""
    jobs: dict[str, Job] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    webhooks: list[dict[str, Any]] = field(default_factory=list)
    buckets: dict[str, dict[str, tuple[str, int]]] = field(default_factory=dict)
    """For each bucket, hash and size of its files."""
    private: dict[str, bool] = field(default_factory=dict)

    def end(self) -> None:
        """End all jobs, so that no container sends anything to the Hub of a later test."""
        for job in self.jobs.values():
            job.cancel()
        for job in self.jobs.values():
            job.thread.join(30)


def install(server: hub.Hub, xet_folder: Path) -> JobsHub:
    """Add Jobs and buckets to a Hub; containers find the storage of buckets in a folder."""
    path = os.pathsep.join([str(ROOT / "tests" / "xet"), str(ROOT)])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "HF_ENDPOINT": server.url}
    environment |= {
        "XET_FOLDER": str(xet_folder),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    extra = JobsHub(environment)
    server.extra = extra  # type: ignore[attr-defined]
    return extra


def _jobs(handler: Any) -> JobsHub:
    found: JobsHub = handler.hub.extra
    return found


def _may_start(handler: Any, namespace: str) -> bool:
    if namespace not in (hub.USER, hub.ORGANIZATION):
        handler._answer(403, {"error": "You don't have the required permissions to start jobs"})
        return False
    return bool(handler._may_write(f"{namespace}/job"))


def _hardware(handler: Any, body: bytes) -> None:
    handler._answer(200, HARDWARE)


def _start(handler: Any, body: bytes, namespace: str) -> None:
    if not _may_start(handler, namespace):
        return
    job = Job(json.loads(body), namespace)
    _jobs(handler).jobs[job.id] = job
    job.thread = threading.Thread(target=job.run, args=(_jobs(handler).environment,), daemon=True)
    job.thread.start()
    handler._answer(200, job.as_json())


def _list(handler: Any, body: bytes, namespace: str) -> None:
    handler._answer(200, [job.as_json() for job in _jobs(handler).jobs.values()])


def _inspect(handler: Any, body: bytes, namespace: str, job: str) -> None:
    handler._answer(200, _jobs(handler).jobs[job].as_json())


def _cancel(handler: Any, body: bytes, namespace: str, name: str) -> None:
    _jobs(handler).jobs[name].cancel()
    handler._answer(200, {})


def _logs(handler: Any, body: bytes, namespace: str, name: str) -> None:
    job, sent = _jobs(handler).jobs[name], 0
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    while True:
        has_ended = job.stage != "RUNNING"
        for line in job.logs[sent:]:
            handler.wfile.write(f"data: {json.dumps({'data': line, 'timestamp': NOW})}\n\n".encode())
            sent += 1
        handler.wfile.flush()
        if has_ended:
            return
        time.sleep(0.02)


def _schedule(handler: Any, body: bytes, namespace: str) -> None:
    if not _may_start(handler, namespace):
        return
    _jobs(handler).schedules.append(json.loads(body))
    owner = {"id": "1", "name": namespace, "type": "user"}
    handler._answer(200, {"id": "s1", "createdAt": NOW, "owner": owner, **json.loads(body), "status": {}})


def _webhooks(handler: Any, body: bytes) -> None:
    handler._answer(200, _jobs(handler).webhooks)


def _webhook(handler: Any, body: bytes) -> None:
    sent = json.loads(body)
    job = _jobs(handler).jobs[sent["jobSourceId"]]
    shown = {
        "id": "w1",
        "job": job.as_json(),
        "watched": sent["watched"],
        "domains": sent["domains"],
        "disabled": False,
    }
    _jobs(handler).webhooks.append({**shown, "sent": sent})
    handler._answer(200, {"webhook": shown})


def _make_bucket(handler: Any, body: bytes, name: str) -> None:
    if not _may_start(handler, name.partition("/")[0]):
        return
    extra = _jobs(handler)
    status = 409 if name in extra.buckets else 200
    if status == 200:
        extra.buckets[name] = {}
        extra.private[name] = json.loads(body).get("visibility") == "private"
    handler._answer(status, {"url": f"{handler.hub.url}/buckets/{name}"})


def _bucket(handler: Any, name: str) -> dict[str, tuple[str, int]] | None:
    bucket = _jobs(handler).buckets.get(name)
    if bucket is None or handler._token() not in hub.ACCESS:
        handler._answer(404, {"error": "Bucket not found"}, {"X-Error-Code": "RepoNotFound"})
        return None
    return bucket


def _bucket_info(handler: Any, body: bytes, name: str) -> None:
    if (bucket := _bucket(handler, name)) is not None:
        shown = {"id": name, "private": _jobs(handler).private.get(name, True), "createdAt": NOW}
        handler._answer(200, {**shown, "size": 0, "totalFiles": len(bucket)})


def _file(path: str, entry: tuple[str, int]) -> dict[str, Any]:
    return {"type": "file", "path": path, "xetHash": entry[0], "size": entry[1], "mtime": NOW}


def _tree(handler: Any, body: bytes, name: str, prefix: str | None) -> None:
    if (bucket := _bucket(handler, name)) is not None:
        below = unquote(prefix or "").rstrip("/")
        found = [p for p in sorted(bucket) if not below or p.startswith(f"{below}/")]
        handler._answer(200, [_file(path, bucket[path]) for path in found])


def _paths_info(handler: Any, body: bytes, name: str) -> None:
    if (bucket := _bucket(handler, name)) is not None:
        handler._answer(200, [_file(p, bucket[p]) for p in json.loads(body)["paths"] if p in bucket])


def _resolve(handler: Any, body: bytes, name: str, path: str) -> None:
    if (bucket := _bucket(handler, name)) is not None:
        digest, size = bucket[path]
        route = f"{handler.hub.url}/xet"
        headers = {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": route, "X-Linked-Size": str(size)}
        handler._answer(200, b"", headers)


def _batch(handler: Any, body: bytes, name: str) -> None:
    if not handler._may_write(name) or (bucket := _bucket(handler, name)) is None:
        return
    folder = Path(_jobs(handler).environment["XET_FOLDER"])
    for line in body.splitlines():
        change = json.loads(line)
        if change["type"] == "addFile":
            bucket[change["path"]] = (change["xetHash"], (folder / change["xetHash"]).stat().st_size)
        else:
            bucket.pop(change["path"], None)
    handler._answer(200, {"failed": []})


_BUCKET = r"([\w.-]+/[\w.-]+)"
_JOB = r"([\w.-]+)/([0-9a-f]{24})"
hub._ROUTES[:0] = [
    ("GET /api/jobs/hardware", _hardware),
    (rf"GET /api/jobs/{_JOB}/logs", _logs),
    (rf"POST /api/jobs/{_JOB}/cancel", _cancel),
    (rf"GET /api/jobs/{_JOB}", _inspect),
    (r"POST /api/jobs/([\w.-]+)", _start),
    (r"GET /api/jobs/([\w.-]+)", _list),
    (r"POST /api/scheduled-jobs/([\w.-]+)", _schedule),
    ("GET /api/settings/webhooks", _webhooks),
    ("POST /api/settings/webhooks", _webhook),
    (rf"POST /api/buckets/{_BUCKET}/batch", _batch),
    (rf"POST /api/buckets/{_BUCKET}/paths-info", _paths_info),
    (rf"GET /api/buckets/{_BUCKET}/tree(?:/(.+))?", _tree),
    (rf"POST /api/buckets/{_BUCKET}", _make_bucket),
    (rf"GET /api/buckets/{_BUCKET}", _bucket_info),
    (rf"(?:HEAD|GET) /buckets/{_BUCKET}/resolve/(.+)", _resolve),
]
