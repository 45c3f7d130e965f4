"""An S3 server on loopback, in memory: real HTTP for the clients of pyarrow and obstore, and faults as in tests/hub.py.

`slow` answers in small pieces; `cut` hangs up in the middle of the content; `stop` never answers.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUCKET = "bucket"


@dataclass
class Fault:
    """How the next `times` requests whose `METHOD /bucket/key` matches `pattern` are treated."""

    pattern: str
    kind: Literal["503", "403", "cut", "lose_answer", "slow", "stop"]
    times: int = 1


@dataclass
class Store:
    """The objects of the one bucket by their keys, the requests so far, and faults to come."""

    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    is_conditional: bool = True
    """Whether If-None-Match is respected; some services ignore it."""
    bytes_per_second: int | None = None
    """How fast contents are sent."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, call: str) -> str | None:
        with self.lock:
            self.requests.append(call)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, call):
                    fault.times -= 1
                    return fault.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each answer is several small packets
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        body = self.body()
        self.fault = self.store.next_fault(f"{self.command} /{bucket}/{key}?{url.query}")
        if self.fault in ("503", "403"):
            code = {"503": "SlowDown", "403": "AccessDenied"}[self.fault]
            self.answer(int(self.fault), f"<Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode())
            return
        if self.fault == "stop":
            time.sleep(3600)
        query = parse_qs(url.query, keep_blank_values=True)
        if bucket != BUCKET:
            self.answer(404, b"<Error><Code>NoSuchBucket</Code><Message>there is none</Message></Error>")
        elif "delete" in query:
            keys = re.findall(rb"<Key>.*?</Key>", body)
            for found in keys:
                self.store.objects.pop(unescape(found.decode())[5:-6], None)
            deleted = b"".join(b"<Deleted>" + found + b"</Deleted>" for found in keys)
            self.answer(200, b"<DeleteResult>" + deleted + b"</DeleteResult>")
        elif self.command in ("PUT", "POST"):
            self.write(key, query, body)
        elif self.command == "DELETE":
            self.store.objects.pop(key, None)
            self.answer(204, b"")
        elif "list-type" in query:
            self.list(query)
        else:
            self.read(key)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(_chunks(self.rfile))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_signed = "aws-chunked" in self.headers.get("Content-Encoding", "")
        return b"".join(_chunks(io.BytesIO(body))) if is_signed else body

    def read(self, key: str) -> None:
        if key not in self.store.objects:
            code = "NoSuchKey" if key else ""
            self.answer(404 if key else 200, f"<Error><Code>{code}</Code></Error>".encode() if key else b"")
            return
        content = self.store.objects[key]
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        found = content[int(start) : int(end) + 1 if end else len(content)]
        headers = {"Content-Range": f"bytes {start}-{int(start) + len(found) - 1}/{len(content)}"}
        self.answer(206 if "Range" in self.headers else 200, found, headers if "Range" in self.headers else {})

    def list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name, content in sorted(self.store.objects.items())
            if name.startswith(prefix)
        )
        body = f"<ListBucketResult><Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self.answer(200, body.encode())

    def write(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        store = self.store
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        if "uploads" in query:
            upload = str(len(store.uploads))
            store.uploads[upload] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self.answer(200, text.encode())
        elif "partNumber" in query:
            store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
            self.answer(200, b"", {"ETag": etag})
        else:
            if "uploadId" in query:
                body = b"".join(content for _, content in sorted(store.uploads[query["uploadId"][0]].items()))
            if store.is_conditional and "If-None-Match" in self.headers and key in store.objects:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            store.objects[key] = body
            name = "CompleteMultipartUploadResult"
            text = f"<{name}><Key>{escape(key)}</Key><ETag>{etag}</ETag></{name}>"
            self.answer(200, text.encode() if "uploadId" in query else b"", {"ETag": etag})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault == "lose_answer":
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.send_response(status)
        values = {"Content-Length": str(len(body)), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **(headers or {})}
        for name, value in values.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif self.store.bytes_per_second is not None and len(body) > 0:
            piece = max(1, self.store.bytes_per_second // 50)
            for start in range(0, len(body), piece):
                time.sleep(0.02)
                self.wfile.write(body[start : start + piece])
        elif self.fault == "slow":
            for start in range(0, len(body), max(1, len(body) // 5)):
                self.wfile.write(body[start : start + max(1, len(body) // 5)])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Decode the chunks of HTTP, or those with a signature that AWS's clients put into a body."""
    while size := int(stream.readline().partition(b";")[0], 16):
        yield stream.read(size)
        stream.readline()
    while stream.readline().strip():  # trailers
        pass


@contextmanager
def serve() -> Iterator[tuple[Store, dict[str, str]]]:
    """Serve an empty bucket; yield it with the variables that its clients need."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_OneStore", (_Handler,), {"store": store}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    credentials = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    yield store, {"AWS_ENDPOINT_URL_S3": url, **credentials}
    server.shutdown()
    server.server_close()
