"""Ray schedules parts, and the bytes are the same as without it; skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stub_tagger import StubTagger, job, tag

from job.errors import InvalidInputError
from job.tagging.engines import check_engine, work_with_ray
from job.tagging.progress import Progress
from job.tagging.worker import finish
from job.types import TaggedText


class DyingTagger(StubTagger):
    """Kills its process in the middle of a part, once."""

    def __init__(self, died: Path) -> None:
        super().__init__()
        self._died = died

    def answers(self, texts: Sequence[str]) -> Iterator[tuple[int, TaggedText]]:
        for number, answer in super().answers(texts):
            if len(self.texts) == 25 and not self._died.exists():
                self._died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield number, answer


class RefusingTagger:
    def __init__(self) -> None:
        raise InvalidInputError("the adapter was trained on another base model")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"quote": f"text {i}"}) + "\n" for i in range(95)))
    return path


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` installs it")
    tests = str(Path(__file__).parent)
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_killed_actor_leaves_the_same_bytes(ray: Any, given: Path, tmp_path: Path) -> None:
    tag(job(given, f"{tmp_path}/expected/"))
    progress, died = Progress(), tmp_path / "died"
    parts = work_with_ray(job(given, f"{tmp_path}/out/"), partial(DyingTagger, died), progress)
    assert died.exists(), "an actor was killed"
    assert finish(parts, None) is not None
    for path in (tmp_path / "expected").rglob("*.json*"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "expected")).read_bytes() == path.read_bytes()
    assert progress.rows == 95


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_what_an_actor_refuses_is_refused(ray: Any, given: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the adapter was trained on another base model"):
        work_with_ray(job(given, f"{tmp_path}/out/"), RefusingTagger, Progress())


def test_ray_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        InvalidInputError, match=r"needs Ray, which is not installed; run `pip install 'tagger-job\[ray\]'`"
    ):
        check_engine("ray", shards=1)
    with pytest.raises(InvalidInputError, match="unset TAGGER_TAG_SHARD"):
        check_engine("ray", shards=2)
    check_engine("local", shards=2)
