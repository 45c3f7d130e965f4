"""What is shown while the job runs: our lines, and of the libraries' only what a user can act on."""

from __future__ import annotations

import logging
import os
import sys
import warnings

NOISY_LOGGERS = {
    # every int8 matrix product with inputs that are not fp16 says so
    "bitsandbytes.autograd._functions": logging.ERROR,
    # tries an optional CPU kernel from the Hub when it is imported
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
    # a line for each HTTP request
    "httpx2": logging.WARNING,
}


def configure() -> None:
    """Log our lines to standard error with the time of day; silence the NOISE, logger by logger."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("job").setLevel(logging.INFO)
    for name, level in NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of downloads and loading are for terminals
    # transformers calls its own deprecated name when peft asks about checkpointing
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
