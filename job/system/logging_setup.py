"""Logging: the job's own lines, and from libraries only what a user can act on."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from typing import Any, Literal

from job.config.redaction import redact, redact_json
from job.system import events
from job.system.printable import printable

NOISY_LOGGERS = {
    # a warning for every int8 matrix product whose inputs are not fp16
    "bitsandbytes.autograd._functions": logging.ERROR,
    # a warning when an optional CPU kernel cannot be loaded from the Hub
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
    # warnings when it cannot keep a cache of fonts in the home folder, and when it makes one
    "matplotlib": logging.ERROR,
    # a line per HTTP request
    "httpx2": logging.WARNING,
}


_make_record = logging.getLogRecordFactory()
_format_warning = warnings.formatwarning
_format = logging.Handler.format


def configure(style: Literal["text", "json"] = "text") -> None:
    """Log the job's lines to standard error with the time of day, and raise the level of NOISY_LOGGERS.

    With the style `json`, standard error has nothing but JSON lines (`events`), and no progress bars.

    In log lines, warnings and tracebacks, those of libraries included, secrets are masked, and terminal escapes and
    commands for CI that they quote from others are harmless.
    """
    events.use_json(style == "json")
    # libraries have handlers of their own, so records are masked where all of them are made
    logging.setLogRecordFactory(_harmless_record)
    formatter = _format_as_json if events.is_json() else _format
    logging.Handler.format = formatter  # type: ignore[method-assign,assignment]
    warnings.formatwarning = _formatted_warning
    sys.excepthook = lambda _, error, __: _print_traceback(error)
    threading.excepthook = lambda caught: None if caught.exc_value is None else _print_traceback(caught.exc_value)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # an event that is worth a JSON line, and no line on a terminal, is logged as DEBUG
    logging.getLogger("job").setLevel(logging.DEBUG if events.is_json() else logging.INFO)
    for name, level in NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    if events.is_json() or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    if events.is_json():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # PyTorch's C++ code warns, with a stack trace, of every closed connection between processes
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # transformers itself calls this deprecated name when peft checks for gradient checkpointing
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _harmless(text: str) -> str:
    return printable(redact(text))


def _formatted_warning(*args: Any, **kwargs: Any) -> str:
    text = _harmless(_format_warning(*args, **kwargs))
    return events.json_line("log", "warning", text.rstrip("\n"), logger="warnings") + "\n" if events.is_json() else text


def _harmless_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _make_record(*args, **kwargs)
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # the arguments do not fit the message; logging reports it where it is written
        return record
    record.msg, record.args = _harmless(message), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = _harmless("".join(traceback.format_exception(record.exc_info[1])).rstrip("\n"))
    return record


def _format_as_json(handler: logging.Handler, record: logging.LogRecord) -> str:
    """Return a record as a JSON line, whatever handler of whatever library writes it to a terminal or a pipe."""
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return _format(handler, record)
    fields = redact_json(getattr(record, "fields", {}))
    if record.exc_text:
        fields = {**fields, "traceback": record.exc_text}
    name = getattr(record, "event", "log")
    return events.json_line(name, record.levelname.lower(), record.getMessage(), logger=record.name, **fields)


def _print_traceback(error: BaseException) -> None:
    if sys.stderr is None:
        return
    text = _harmless("".join(traceback.format_exception(error)))
    if events.is_json():
        events.write("crash", "error", text.rstrip("\n").rpartition("\n")[2], traceback=text)
    else:
        sys.stderr.write(text)
