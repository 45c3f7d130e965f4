"""A webhook on the loopback interface: it keeps what it is told, and answers, hangs or closes the connection."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

SECRET = "T0123456789abcdef"
"""The end of the URL."""
Behaviour = Literal["ok", "error", "hang", "drip", "close", "redirect"]


@dataclass
class Hook:
    url: str = ""
    received: list[dict[str, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def webhook(behaviour: Behaviour = "ok") -> Iterator[Hook]:
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if behaviour == "hang":
                hook.ended.wait(30)
            elif behaviour == "drip":
                self.wfile.write(b"HTTP/1.1 ")
                while not hook.ended.wait(0.1):
                    self.wfile.write(b"2")
            elif behaviour != "close":
                self.send_response({"ok": 200, "error": 500, "redirect": 307}[behaviour])
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client has gone
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hook.url = f"http://127.0.0.1:{server.server_address[1]}/services/{SECRET}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hook
    finally:
        hook.ended.set()
        server.shutdown()
        server.server_close()
