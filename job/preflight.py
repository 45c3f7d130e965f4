"""Everything that can be known before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from job import data, push, quantize, report, run_folder
from job.locate import is_local
from job.results import Examples, Refused
from job.run_folder import RunFolder
from job.settings import Settings


def check(settings: Settings) -> tuple[Examples, RunFolder]:
    """Read the data, look for the base model, the token and a writable run folder.

    Raises Refused with every problem found. Returns what was read on the way; nothing is written.
    """
    problems: list[str] = []

    def attempt(step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Refused as refusal:
            problems.extend(refusal.problems)
            return None

    examples = attempt(data.load, settings.data)
    if is_local(settings.base.model, quantize.WEIGHTS):
        attempt(quantize.check_local, settings.base.model)
    attempt(push.check, settings.hub)
    attempt(data.texts_to_tag, settings.sample)
    attempt(report.check_output, settings.sample.output)
    if examples is None:
        attempt(run_folder.try_to_write, settings.run.dir)
    else:
        run = attempt(RunFolder.open, settings, examples)
    if problems:
        raise Refused(*problems)
    return examples, run
