"""Which share of the parts a worker has: TAGGER_TAG_SHARD, or the variables of an array job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from job.errors import InvalidInputError


@dataclass(frozen=True)
class Shard:
    """Worker `index` of `count`; the index counts from 0."""

    index: int = 0
    count: int = 1

    def own(self, parts: int) -> range:
        """Return the parts of this worker: neighbours, so that it reads its input from one place on."""
        return range(self.index * parts // self.count, (self.index + 1) * parts // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


_INDEX_VARIABLES = {
    "JOB_COMPLETION_INDEX": "Kubernetes",
    "AWS_BATCH_JOB_ARRAY_INDEX": "AWS Batch",
    "CLOUD_RUN_TASK_INDEX": "Cloud Run",
    "SLURM_ARRAY_TASK_ID": "Slurm",
    "SKYPILOT_JOB_RANK": "SkyPilot",
}
"""The variable of each scheduler that says which worker of an array this is."""


def resolve(setting: str, environ: Mapping[str, str] = os.environ) -> Shard:
    """Return the share that TAGGER_TAG_SHARD names: `i/n`, `auto`, or `auto/n` where the scheduler does not know n.

    Raises InvalidInputError when the variables of two schedulers are set, or when one of them is missing or no number.
    """
    index, _, count = setting.partition("/")
    if index != "auto":
        return Shard(int(index), int(count))
    found = [name for name in _INDEX_VARIABLES if environ.get(name)]
    if len(found) > 1:
        raise InvalidInputError(
            f"{' and '.join(found)} are set, the variables of two schedulers; set TAGGER_TAG_SHARD to i/n, i from 0"
        )
    if not found:
        if count:
            raise InvalidInputError(
                f"TAGGER_TAG_SHARD={setting} needs the variable of an array job ({', '.join(_INDEX_VARIABLES)}), and "
                "none is set; set TAGGER_TAG_SHARD to i/n, i from 0"
            )
        return Shard()
    shard = _of_scheduler(found[0], environ, int(count) if count else None)
    if not 0 <= shard.index < shard.count:
        raise InvalidInputError(
            f"{found[0]}={environ[found[0]]} makes this worker {shard.index} of {shard.count}; expected 0 to "
            f"{shard.count - 1}. Set TAGGER_TAG_SHARD to i/n, i from 0"
        )
    return shard


def _of_scheduler(variable: str, environ: Mapping[str, str], count: int | None) -> Shard:
    def number(name: str, default: int | None = None) -> int:
        value = environ.get(name, "")
        if not value and default is not None:
            return default
        if not value.isdecimal():
            raise InvalidInputError(
                f"{variable} is set and {name} is {value or 'not set'}; expected a number. Set TAGGER_TAG_SHARD to "
                "i/n, i from 0"
            )
        return int(value)

    index = number(variable)
    if variable == "JOB_COMPLETION_INDEX":
        if count is None:
            raise InvalidInputError(
                f"JOB_COMPLETION_INDEX={index} does not say of how many; set TAGGER_TAG_SHARD to auto/n, where n is "
                "spec.completions of the job"
            )
        return Shard(index, count)
    if variable == "SLURM_ARRAY_TASK_ID":
        step = max(1, number("SLURM_ARRAY_TASK_STEP", 1))
        return Shard((index - number("SLURM_ARRAY_TASK_MIN")) // step, number("SLURM_ARRAY_TASK_COUNT"))
    counts = {
        "AWS_BATCH_JOB_ARRAY_INDEX": "AWS_BATCH_JOB_ARRAY_SIZE",
        "CLOUD_RUN_TASK_INDEX": "CLOUD_RUN_TASK_COUNT",
        "SKYPILOT_JOB_RANK": "SKYPILOT_NUM_JOBS",
    }
    return Shard(index, number(counts[variable]))
