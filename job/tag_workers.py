"""Tag the parts of a job in several processes of this machine, each with a GPU and a model of its own."""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from job import inference
from job.distributed import launcher
from job.distributed.place import Machines, Place
from job.runs.atomic import atomic_write
from job.settings import Settings
from job.system.device import ComputeSpec
from job.tagging import worker
from job.tagging.plan import Job, Parts
from job.tagging.progress import Progress
from job.tagging.worker import TextTagger

log = logging.getLogger(__name__)

TASK = "parts"
"""What `job.worker` is told to do."""
REPORT_SECONDS = 1.0
"""Between two reports of a process about its progress."""


def work(
    job: Job,
    settings: Settings,
    adapter: str | Path,
    progress: Progress,
    *,
    processes: int,
    own: Callable[[int], Iterable[int]],
    sync: worker.Sync = worker.no_sync,
) -> Parts:
    """Do what `worker.work` does in this many processes: each takes the next part that no other one has.

    Raises InvalidInputError for an input, an output, an adapter or a seal that does not fit.
    """
    data, parts = worker.open_job(job)
    mine = set(own(len(parts)))
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    folder: Path | None = None
    while todo := worker.unsealed(parts, sync):
        if folder is None:
            worker.start_progress(progress, parts, [part for part in todo if part in mine] or todo)
            folder = inference.prepare(settings, adapter)
        others = [part for part in todo if part not in mine]
        random.Random(str(sorted(mine))).shuffle(others)  # not in the order of other helpers
        with tempfile.TemporaryDirectory(prefix="tagger-") as shared:
            inputs = {
                "task": TASK,
                "settings": settings.model_dump(mode="json"),
                "adapter": str(folder.absolute()),
                "job": job.as_json(),
                "todo": [part for part in todo if part in mine] + others,
                "folder": shared,
            }
            count = min(processes, len(todo))
            log.info("tag: %d processes", count)
            launcher.launch(
                count,
                inputs,
                machines=Machines(),
                virtual_gpus=compute.device.type == "cuda",
                offline=not data.reads_hub,
                on_progress=_Watcher(Path(shared), progress, sync),
            )
    progress.close()
    worker.check_unchanged(parts, data)
    return parts


def take_part(place: Place, inputs: dict[str, Any], load: Callable[[Settings, str | Path], TextTagger]) -> None:
    """Do the part of a process that `work` started: tag those parts that it is the first to claim."""
    folder = Path(inputs["folder"])
    progress = _ReportedProgress(folder / f"progress-{place.rank}.json")
    data, parts = worker.open_job(Job.from_json(inputs["job"]))
    tagger: TextTagger | None = None
    for part in _claimed(folder, inputs["todo"]):
        if parts.is_sealed(part):  # by a worker of another machine
            continue
        if tagger is None:
            tagger = load(Settings.model_validate(inputs["settings"]), Path(inputs["adapter"]))
        worker.tag_part(parts, data, part, tagger, progress)
        progress.report()


def _claimed(folder: Path, todo: Sequence[int]) -> Iterator[int]:
    """Yield the parts that no other process of this machine has claimed, each when it is this one's."""
    for part in todo:
        try:
            os.close(os.open(folder / f"claim-{part}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield part


class _ReportedProgress(Progress):
    """Progress that is shown by the process that started this one."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file, self._reported = file, 0.0

    def add_rows(self, rows: int) -> None:
        self.rows += rows
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        """Leave the numbers of rows and parts for the process that shows them."""
        self._reported = time.monotonic()
        atomic_write(self._file, json.dumps([self.rows, self.parts_done]))


class _Watcher:
    """Adds up what the processes report, and exchanges files with the workers of other machines."""

    def __init__(self, folder: Path, progress: Progress, sync: worker.Sync) -> None:
        self._folder, self._progress, self._sync = folder, progress, sync
        self._rows, self._parts = 0, 0

    def __call__(self) -> None:
        reports = [json.loads(file.read_text()) for file in self._folder.glob("progress-*.json")]
        rows, parts = sum(report[0] for report in reports), sum(report[1] for report in reports)
        for _ in range(parts - self._parts):
            self._progress.add_part()
        if rows > self._rows:
            self._progress.add_rows(rows - self._rows)
        self._rows, self._parts = rows, parts
        self._sync(now=False)
