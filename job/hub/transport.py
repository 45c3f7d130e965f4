"""HTTP to the Hub: every answer is limited in size and time, and checked before the Hub's client reads it."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

from job.hub import answers
from job.hub.answers import HubAnswerError, HubTimeoutError

T = TypeVar("T")
READ_SECONDS = 30.0
"""Seconds for a request that only reads, from the connection to the last byte of the answer."""
WRITE_SECONDS = 120.0
"""Seconds for a request that changes something, such as a commit, in addition to those for sending its body."""
MIN_BYTES_PER_SECOND = 16 * 1024
"""Files are sent and received at least this fast, on average, after the first READ_SECONDS."""
MAX_ANSWER_BYTES = 32 * 2**20
MAX_ERROR_BYTES = 64 * 1024
MAX_REQUESTS = 1000
"""Requests for one step, such as the pages of a list."""
STEP_SECONDS = 300.0
"""Seconds that one step may wait for answers, transfers of files not counted."""
MAX_CLIENT_WAIT = 10
"""Seconds that the Hub's client itself may be asked to wait; it would wait for any time."""


@dataclass
class _Budget:
    """What is left for one step: its requests, and the seconds in which answers may arrive."""

    requests: int
    seconds: float


_sent: Callable[[int], None] | None = None
"""Is told how many bytes of files were sent; a global, because the Hub's client sends them in threads of its own."""
_budget: contextvars.ContextVar[_Budget | None] = contextvars.ContextVar("_budget", default=None)
_small_files: contextvars.ContextVar[bool] = contextvars.ContextVar("_small_files", default=False)


@contextmanager
def step_budget() -> Iterator[None]:
    """Limit the number and the time of the requests in the block: a list could have pages without end."""
    token = _budget.set(_Budget(MAX_REQUESTS, STEP_SECONDS))
    try:
        yield
    finally:
        _budget.reset(token)


@contextmanager
def small_files() -> Iterator[None]:
    """Limit the files that are downloaded in the block like any other answer."""
    token = _small_files.set(True)
    try:
        yield
    finally:
        _small_files.reset(token)


@contextmanager
def sent_bytes_reported_to(add: Callable[[int], None]) -> Iterator[None]:
    """Call `add` with the number of bytes, for each piece of a file that is sent in the block."""
    global _sent
    _sent = add
    try:
        yield
    finally:
        _sent = None


def bounded_client() -> httpx2.Client:
    """Return a client for huggingface_hub's `set_client_factory`."""
    with default_client_factory() as template:
        return _BoundedClient(
            event_hooks=template.event_hooks, follow_redirects=True, timeout=httpx2.Timeout(60, connect=10)
        )


class _BoundedClient(httpx2.Client):
    """Sends each request in a thread of its own, so that nothing that the other side does can hold up the job."""

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        budget = _budget.get()
        seconds = _seconds_for(request)
        if budget is not None:
            if budget.requests <= 0 or budget.seconds <= 0:
                raise HubTimeoutError(f"{_call(request)} is one request too many: the Hub's answers have no end")
            budget.requests -= 1
            is_short = request.method in ("GET", "HEAD")
            seconds = min(seconds, budget.seconds) if is_short else seconds
        started = time.monotonic()
        try:
            return _in_time(lambda: self._exchange(request, stream=stream, **options), seconds, _call(request))
        finally:
            if budget is not None and request.method in ("GET", "HEAD"):
                budget.seconds -= time.monotonic() - started

    def _exchange(self, request: httpx2.Request, *, stream: bool, **options: Any) -> httpx2.Response:
        """Send a request, and return the answer checked; the content of a file follows as a stream."""
        if request.method == "PUT" and _sent is not None:
            request.stream = _CountedStream(cast(httpx2.SyncByteStream, request.stream), _sent)
        response = super().send(request, stream=True, **options)
        try:
            _check_headers(request, response)
            is_error = response.status_code >= 400
            if stream and not is_error and not _small_files.get():
                source = cast(httpx2.SyncByteStream, response.stream)
                response.stream = _BoundedStream(source, _call(request))
                return response
            content = _read(response, MAX_ERROR_BYTES if is_error else MAX_ANSWER_BYTES, _call(request))
        except BaseException:
            response.close()
            raise
        response.close()
        return _rebuilt(request, response, content)


class _CountedStream(httpx2.SyncByteStream):
    """The content of a request that counts the bytes sent."""

    def __init__(self, source: httpx2.SyncByteStream, add: Callable[[int], None]) -> None:
        self._source, self._add = source, add

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._source:
            yield chunk
            self._add(len(chunk))

    def close(self) -> None:
        self._source.close()


class _BoundedStream(httpx2.SyncByteStream):
    """The content of a file, which ends with an error when it arrives too slowly."""

    def __init__(self, source: httpx2.SyncByteStream, call: str) -> None:
        self._source, self._call = source, call

    def __iter__(self) -> Iterator[bytes]:
        started, received = time.monotonic(), 0
        for chunk in self._source:
            received += len(chunk)
            seconds = READ_SECONDS + received / MIN_BYTES_PER_SECOND
            if time.monotonic() - started > seconds:
                raise HubTimeoutError(f"the answer to {self._call} is too slow: {received} bytes in {seconds:.0f} s")
            yield chunk

    def close(self) -> None:
        self._source.close()


def _in_time(step: Callable[[], httpx2.Response], seconds: float, call: str) -> httpx2.Response:
    """Return what `step` returns within some seconds; after that it is left behind in its thread.

    A time-out for each read, which is all that the HTTP client has, never ends a server that sends a byte at a time.
    """
    outcome: queue.SimpleQueue[httpx2.Response | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run() -> None:
        try:
            response = step()
        except BaseException as error:
            outcome.put(error)
            return
        outcome.put(response)
        if abandoned.is_set():
            response.close()

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    try:
        result = outcome.get(timeout=seconds)
    except queue.Empty:
        abandoned.set()
        raise HubTimeoutError(f"{call} has no complete answer after {seconds:.0f} s") from None
    if isinstance(result, BaseException):
        try:
            raise result
        finally:
            del result  # the error refers to this frame, and what a frame holds is only freed once nothing refers to it
    return result


def _seconds_for(request: httpx2.Request) -> float:
    if request.method in ("GET", "HEAD"):
        return READ_SECONDS
    length = request.headers.get("Content-Length", "0")
    return WRITE_SECONDS + (int(length) if length.isdecimal() else 0) / MIN_BYTES_PER_SECOND


def _call(request: httpx2.Request) -> str:
    """Return method and path of a request, without the address of the Hub."""
    path = str(request.url.path)
    base = httpx2.URL(constants.ENDPOINT).path.rstrip("/")
    return f"{request.method} {path.removeprefix(base) if base else path}"


def _is_hub(request: httpx2.Request) -> bool:
    """Return whether a request goes to the Hub itself, and not to a store that the Hub has named."""
    endpoint = httpx2.URL(constants.ENDPOINT)
    return (request.url.host, request.url.port) == (endpoint.host, endpoint.port)


def _check_headers(request: httpx2.Request, response: httpx2.Response) -> None:
    call = _call(request)
    is_file = "/resolve/" in call and not call.startswith("HEAD /buckets/")  # a bucket has no commits
    if request.method == "HEAD" and _is_hub(request) and is_file:
        headers = {name.lower(): value for name, value in response.headers.items()}
        answers.check_file_headers(call, headers, found=response.status_code == 200)


def _read(response: httpx2.Response, most: int, call: str) -> bytes:
    """Return the content of an answer; of an error status, its first bytes."""
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > most:
            if response.status_code >= 400:
                break
            raise HubAnswerError(f"the answer to {call} has more than {most} bytes")
    return bytes(content[:most])


def _rebuilt(request: httpx2.Request, response: httpx2.Response, content: bytes) -> httpx2.Response:
    """Return the response with its content checked, and with no more than MAX_CLIENT_WAIT to wait for the client."""
    headers = httpx2.Headers(response.headers)
    for name in ("Content-Encoding", "Transfer-Encoding"):
        headers.pop(name, None)
    if response.status_code >= 400 and request.method != "HEAD":
        content = answers.error_content(content, headers.get("Content-Type", ""))
    elif response.status_code < 300 and request.method != "HEAD" and _is_hub(request):
        # the content of a file is in no table of calls, and stays as it is
        content = answers.check(_call(request), content)
    if request.method != "HEAD":
        headers["Content-Length"] = str(len(content))
    wait = answers.retry_after(headers.pop("Retry-After", None))
    limits = parse_ratelimit_headers({"ratelimit": headers.pop("RateLimit", "")})  # the client waits for any time too
    if not wait and response.status_code == 429 and limits is not None and limits.remaining == 0:
        wait = float(limits.reset_in_seconds)
    if wait:
        headers["Retry-After"] = str(min(round(wait + 0.5), MAX_CLIENT_WAIT))
    rebuilt = httpx2.Response(
        response.status_code,
        headers=headers,
        content=content,
        request=response.request,
        history=response.history,
        extensions={**response.extensions, "retry_after": wait},
    )
    rebuilt.elapsed = response.elapsed
    return rebuilt
