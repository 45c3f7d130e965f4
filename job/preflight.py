"""Everything that can be known before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job import data, hub, push, quantize, report, run_folder
from job.locate import is_local
from job.results import Examples, Refused, Resolved
from job.run_folder import RunFolder
from job.settings import Settings


@dataclass(frozen=True)
class Checked:
    """What the check found, with which the run goes on."""

    settings: Settings
    """As given, but with commit hashes for the revisions of base model and data set."""
    examples: Examples
    run: RunFolder
    repo: str | None
    """Where the run will be pushed, or None."""
    licence: str | None
    """The base model's, as its page on the Hub has it."""


def check(settings: Settings) -> Checked:
    """Look at token, repo, base model, data and run folder; on disk nothing is written.

    Raises Refused with every problem found.
    """
    problems: list[str] = []

    def attempt(step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Refused as refusal:
            problems.extend(refusal.problems)
            return None

    settings = run_folder.as_begun(settings)
    base: Resolved | None = None
    dataset: Resolved | None = None
    if is_local(settings.base.model, quantize.WEIGHTS):
        attempt(quantize.check_local, settings.base.model)
    elif not hub.is_offline():
        base = attempt(hub.resolve, "model", settings.base.model, settings.base.revision)
    if not is_local(settings.data.dataset, data.FORMATS) and not hub.is_offline():
        dataset = attempt(hub.resolve, "dataset", settings.data.dataset, settings.data.revision)
    repo = attempt(push.prepare, settings)
    attempt(data.texts_to_tag, settings.sample)
    attempt(report.check_output, settings.sample.output, settings.sample.input, settings.data.dataset)
    if problems and not is_local(settings.data.dataset, data.FORMATS):
        raise Refused(*problems)  # before a data set is downloaded

    settings = settings.pinned(base=base.commit if base else None, data=dataset.commit if dataset else None)
    examples = attempt(data.load, settings.data)
    if examples is None:
        attempt(run_folder.try_to_write, settings.run.dir)
        raise Refused(*problems)
    run = attempt(RunFolder.open, settings, examples)
    if problems:
        raise Refused(*problems)
    return Checked(settings, examples, run, repo, base.licence if base else None)


def check_machine(checked: Checked) -> list[str]:
    """Look at device, precision, memory, disk and the longest examples; returns a line for each.

    Raises Refused with every problem found. Imports torch and transformers, and downloads the base
    model's files if they are not there.
    """
    from job import estimate
    from job.device import Machine, why_no_gpu

    settings, examples = checked.settings, checked.examples
    machine = Machine.resolve(settings.run.device, settings.train.precision)
    tokenizer = quantize.load_tokenizer(settings.base)
    longest = sorted(examples.train, key=lambda e: len(e.text), reverse=True)[:1]  # micro-batches get no smaller
    encoded = data.encode(tokenizer, longest, settings)
    for example in encoded:
        assert example.labels[-1] == tokenizer.eos_token_id, "the end of sequence is a label"
    need = estimate.estimate(settings, machine, encoded)
    problems = [
        *estimate.cpu_problems(need, settings, machine),
        *estimate.memory_problems(need, machine),
        *estimate.disk_problems(need, checked.run.path),
    ]
    if problems:
        raise Refused(*problems)
    because = f", for {why_no_gpu()}" if settings.run.device == "auto" and machine.device.type == "cpu" else ""
    return [
        f"device: {machine}{because}",
        f"longest example: {len(encoded[0].input_ids)} tokens",
        f"memory: at least {need}",
    ]
