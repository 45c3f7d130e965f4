"""What a run may cost, in time or money, over all its attempts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from job.cloud.gpus import PRICES_AS_OF, price_per_second
from job.config.validators import parse_budget
from job.errors import InvalidInputError
from job.runs import attempts, shutdown
from job.runs.run_folder import RunFolder
from job.settings import Run

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often the time of an attempt is compared with its budget."""


def price_per_hour(settings: Run, device: str, gpus: int) -> tuple[float, str] | None:
    """Return what an hour on this machine costs in US dollars, and where that is from; None if it is unknown."""
    if settings.price_per_hour is not None:
        return settings.price_per_hour, "TAGGER_RUN_PRICE_PER_HOUR"
    price = price_per_second(device)
    if price is None:
        return None
    return 3600 * price * gpus, f"Modal's list price of this GPU alone, of {PRICES_AS_OF}"


def seconds_left(settings: Run, run: RunFolder, device: str, gpus: int) -> float | None:
    """Return how many seconds of TAGGER_RUN_BUDGET are left for this attempt; None without a budget.

    Raises InvalidInputError if nothing is left, or if it is in dollars and no price is known.
    """
    if settings.budget is None:
        return None
    amount, unit = parse_budget(settings.budget)
    if unit == "$":
        price = price_per_hour(settings, device, gpus)
        if price is None:
            raise InvalidInputError(
                f"TAGGER_RUN_BUDGET={settings.budget} is in dollars and no price of {device} is known; set "
                "TAGGER_RUN_PRICE_PER_HOUR, or a time such as 2h"
            )
        amount = 3600 * amount / price[0]
    used = attempts.used_seconds(run)
    if used >= amount:
        raise InvalidInputError(
            f"TAGGER_RUN_BUDGET={settings.budget} is used up: the attempts of {run.path} took {used:.0f} s; "
            "raise it, or remove it"
        )
    return amount - used


@contextmanager
def limited(settings: Run, run: RunFolder, seconds: float | None) -> Iterator[None]:
    """Interrupt the job when its attempt has taken so many seconds: the last complete step is saved, and 75 the end.

    An attempt that takes longer only to load is interrupted after that, so that it counts and is not repeated forever.
    """
    if seconds is None:
        yield
        return
    ended, begun_before = threading.Event(), len(attempts.attempts(run))

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            elapsed = attempts.running_seconds(run.path, after=begun_before)
            if elapsed is not None and elapsed >= seconds:
                log.warning("run: TAGGER_RUN_BUDGET=%s is used up; the last complete step is saved", settings.budget)
                shutdown.interrupt("TAGGER_RUN_BUDGET")
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
