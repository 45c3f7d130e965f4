"""Each scheduler's variables name a worker's share; what is ambiguous is refused."""

from __future__ import annotations

import pytest

from job.errors import InvalidInputError
from job.tagging.shards import Shard, resolve

SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("2/7", {"CLOUD_RUN_TASK_INDEX": "0", "SLURM_ARRAY_TASK_ID": "1"}, Shard(2, 7)),
        ("auto", {}, Shard(0, 1)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "3"}, Shard(3, 8)),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "5"}, Shard(0, 5)),
        ("auto", {"CLOUD_RUN_TASK_INDEX": "4", "CLOUD_RUN_TASK_COUNT": "5"}, Shard(4, 5)),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "2"}, Shard(2, 4)),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "6"}, Shard(3, 4)),
        ("auto", {"SKYPILOT_JOB_RANK": "1", "SKYPILOT_NUM_JOBS": "2"}, Shard(1, 2)),
    ],
)
def test_a_share_is_read_from_setting_or_scheduler(setting: str, environ: dict[str, str], expected: Shard) -> None:
    assert resolve(setting, environ) == expected


@pytest.mark.parametrize(
    ("setting", "environ", "message"),
    [
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, "set TAGGER_TAG_SHARD to auto/n, where n is spec.completions"),
        ("auto/8", {}, "TAGGER_TAG_SHARD=auto/8 needs the variable of an array job"),
        ("auto/3", {"JOB_COMPLETION_INDEX": "3"}, "makes this worker 3 of 3; expected 0 to 2"),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_MIN": ""}, "SLURM_ARRAY_TASK_MIN is not set"),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "2"}, "expected 0 to 3"),
        ("auto", {"CLOUD_RUN_TASK_INDEX": "x", "CLOUD_RUN_TASK_COUNT": "5"}, "CLOUD_RUN_TASK_INDEX is x"),
        ("auto", SLURM | {"SKYPILOT_JOB_RANK": "1"}, "SLURM_ARRAY_TASK_ID and SKYPILOT_JOB_RANK are set"),
    ],
)
def test_what_is_ambiguous_is_refused(setting: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        resolve(setting, environ)
    assert message in str(refusal.value)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_shares_are_all_parts_once(count: int) -> None:
    for parts in (0, 1, 10, 101):
        assert [part for index in range(count) for part in Shard(index, count).own(parts)] == list(range(parts))
