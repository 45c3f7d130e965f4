"""Engines that schedule parts. `worker.work` is the local one; Ray runs the same function for a part in actors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from job.errors import InvalidInputError, JobError
from job.tagging.plan import Job, Parts
from job.tagging.progress import Progress
from job.tagging.worker import TextTagger, check_unchanged, open_job, start_progress, tag_part

log = logging.getLogger(__name__)


def check_engine(engine: str, *, shards: int) -> None:
    """Raise InvalidInputError when an engine is not installed, or does not fit to the number of shards."""
    if engine != "ray":
        return
    if shards > 1:
        raise InvalidInputError(
            "TAGGER_TAG_ENGINE=ray schedules all parts, so it cannot be one worker of several; unset TAGGER_TAG_SHARD"
        )
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InvalidInputError(
            "TAGGER_TAG_ENGINE=ray needs Ray, which is not installed; run `pip install 'tagger-job[ray]'`"
        ) from error


class PartWorker:
    """An actor: it loads the model once, and tags the parts that it is given."""

    def __init__(self, job: Job, load: Callable[[], TextTagger]) -> None:
        self._data, self._parts = open_job(job)
        self._load = load
        self._tagger: TextTagger | None = None

    def tag(self, part: int) -> int:
        """Tag and seal a part; return the number of its rows."""
        progress = Progress()
        if self._tagger is None:
            self._tagger = self._load()
        if not self._parts.is_sealed(part):
            tag_part(self._parts, self._data, part, self._tagger, progress)
        return progress.rows


def work_with_ray(job: Job, load: Callable[[], TextTagger], progress: Progress) -> Parts:
    """Tag all parts that are not sealed with the actors of a Ray cluster, which restarts those that are lost.

    The cluster is that of RAY_ADDRESS, or a new one on this machine. An actor takes a GPU if the cluster has any, else
    a CPU. Raises what an actor raised, if it is a JobError.
    """
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool

    data, parts = open_job(job)
    if not (todo := parts.unsealed()):
        return parts
    start_progress(progress, parts, todo)
    is_own = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    device = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
    count = min(len(todo), max(1, int(resources.get(device, 1))))
    log.info("tag: %d Ray actors with a %s each", count, device)
    options: dict[str, Any] = {"num_gpus": 1} if device == "GPU" else {"num_cpus": 1}
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(PartWorker)
    try:
        pool = ActorPool([actor.remote(job, load) for _ in range(count)])
        while todo:
            for rows in pool.map_unordered(lambda worker, part: worker.tag.remote(part), todo):
                progress.add_rows(rows)
                progress.add_part()
            todo = parts.unsealed()
    except RayTaskError as error:
        if isinstance(error.cause, JobError):
            raise error.cause from error
        raise
    finally:
        if is_own:
            ray.shutdown()
    progress.close()
    check_unchanged(parts, data)
    return parts
