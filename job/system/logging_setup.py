"""Logging: the job's own lines, and from libraries only what a user can act on."""

from __future__ import annotations

import logging
import os
import sys
import warnings

NOISY_LOGGERS = {
    # a warning for every int8 matrix product whose inputs are not fp16
    "bitsandbytes.autograd._functions": logging.ERROR,
    # a warning when an optional CPU kernel cannot be loaded from the Hub
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
    # a line per HTTP request
    "httpx2": logging.WARNING,
}


def configure() -> None:
    """Log the job's lines to standard error with the time of day, and raise the level of NOISY_LOGGERS."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("job").setLevel(logging.INFO)
    for name, level in NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    # transformers itself calls this deprecated name when peft checks for gradient checkpointing
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
